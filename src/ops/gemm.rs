//! Bounds-checked calls of the `gemm` crate: for tiles inside a worker, and with all threads into a part of a matrix.

use gemm::Parallelism;

/// A row-major matrix within a slice, with rows `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    /// First element of the first row at index 0.
    pub data: &'a [f32],
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a> Strided<'a> {
    /// Returns the first `width` elements of a row.
    pub fn row(&self, row: usize, width: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..width]
    }

    fn check(&self, rows: usize, cols: usize) {
        assert!(rows == 0 || self.data.len() >= (rows - 1) * self.stride + cols, "matrix exceeds its slice");
    }
}

/// `c[m, n] = a[m, k] · b[n, k]ᵀ` on the calling thread, with `c`'s rows `n` apart.
pub fn multiply_transposed(m: usize, n: usize, k: usize, a: Strided, b: Strided, c: &mut [f32]) {
    transposed(m, n, k, a, b, c, n, Parallelism::None);
}

/// `c[m, n] = a[m, k] · b[n, k]ᵀ` on all threads, with rows of `a` and `b` `k` apart and those of `c` `stride`.
pub fn multiply_transposed_parallel([m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32], stride: usize) {
    let rows = |data| Strided { data, stride: k };
    transposed(m, n, k, rows(a), rows(b), c, stride, Parallelism::Rayon(rayon::current_num_threads()));
}

#[allow(clippy::too_many_arguments)]
fn transposed(
    m: usize,
    n: usize,
    k: usize,
    a: Strided,
    b: Strided,
    c: &mut [f32],
    stride: usize,
    parallelism: Parallelism,
) {
    a.check(m, k);
    b.check(n, k);
    Strided { data: c, stride }.check(m, n);
    // SAFETY: the three checks above cover every element that the strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride as isize,
            false,
            a.data.as_ptr(),
            1,
            a.stride as isize,
            b.data.as_ptr(),
            b.stride as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `y[m] = a[m, k] · x[k]` of f32 or complex numbers on the calling thread, with rows of `a` side by side, or columns.
///
/// # Panics
/// Panics for other numbers, or if `a` is shorter than `m k`.
#[cfg(feature = "eval")]
pub fn multiply_vector<T: num_traits::Num + Copy + 'static>(a: &[T], by_rows: bool, x: &[T], y: &mut [T]) {
    let (m, k) = (y.len(), x.len());
    assert!(a.len() >= m * k, "matrix exceeds its slice");
    let (column, row) = if by_rows { (1, k as isize) } else { (m as isize, 1) };
    // SAFETY: the check above covers every element of `a` that the strides reach; `x` and `y` have their own lengths.
    unsafe {
        gemm::gemm(
            m,
            1,
            k,
            y.as_mut_ptr(),
            m as isize,
            1,
            false,
            a.as_ptr(),
            column,
            row,
            x.as_ptr(),
            k as isize,
            1,
            T::zero(),
            T::one(),
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `c[m, n] += a[m, k] · b[k, n]`, with `c`'s rows `n` apart.
pub fn multiply_add(m: usize, n: usize, k: usize, a: Strided, b: Strided, c: &mut [f32]) {
    a.check(m, k);
    accumulate([m, n, k], a.data, [a.stride, 1], b, c);
}

/// `c[m, n] += a[k, m]ᵀ · b[k, n]`, with `c`'s rows `n` apart.
pub fn multiply_add_of_transposed(m: usize, n: usize, k: usize, a: Strided, b: Strided, c: &mut [f32]) {
    a.check(k, m);
    accumulate([m, n, k], a.data, [1, a.stride], b, c);
}

/// `c += a · b` with rows and columns of `a`, which the caller has checked, at the strides given.
fn accumulate([m, n, k]: [usize; 3], a: &[f32], [row, column]: [usize; 2], b: Strided, c: &mut [f32]) {
    b.check(k, n);
    assert!(c.len() >= m * n, "output exceeds its slice");
    // SAFETY: the callers' check of `a` and the two checks above cover every element that the strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            true,
            a.as_ptr(),
            column as isize,
            row as isize,
            b.data.as_ptr(),
            1,
            b.stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
