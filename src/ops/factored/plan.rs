//! A product of butterflies and permutations applied to one vector at a time, on one thread.

use super::pass::{gather, Run, Untranspose};
use super::tile::{pair_of, Shape, Step};
use crate::error::{Error, Result};
use pulp::{Arch, Simd, WithSimd};

/// A product with its weights laid out for vector instructions, for any number of vectors.
///
/// Elements are gathered by the permutation into the order of a transposed matrix of `W` rows (`W` is the width of a
/// vector), in which the factors with blocks of up to `W` rows work on `W` blocks in every instruction; then they are
/// brought into natural order, in which the halves of larger blocks are contiguous. Two factors are merged into one
/// pass over the elements where there are two.
///
/// A pass over complex numbers is shorter where the input is real, and where only the real part of the result counts.
#[derive(Debug)]
pub struct Plan {
    shape: Shape,
    /// Elements of a vector instruction.
    width: usize,
    stages: Vec<Stage>,
    /// What permutes the last butterfly's result.
    last: Option<Vec<u32>>,
    /// See [`Untranspose`].
    shuffles: bool,
}

/// A butterfly after a permutation.
#[derive(Debug)]
struct Stage {
    /// Which element of the input goes to each place of the transposed order.
    index: Vec<u32>,
    /// Passes in transposed order, then those in natural order.
    passes: [Vec<Pass>; 2],
}

/// One factor, or two merged; lengths are in vectors.
#[derive(Debug)]
pub(super) struct Pass {
    /// Whether two factors are merged.
    pub merged: bool,
    /// From an element to the one that it meets in the first factor.
    pub stride: usize,
    /// Vectors that lie side by side and have the same place in the factor.
    pub run: usize,
    /// Whether the vectors of a run share weights.
    pub splat: bool,
    /// Whether blocks share weights.
    tied: bool,
    /// Rows of `W`, in the order in which the passes read them.
    pub weights: Aligned,
}

impl Pass {
    /// The weights of the `j`-th run of a block: of each of its vectors, or of all of them.
    #[inline(always)]
    pub fn group<'a, T>(&self, block: usize, j: usize, weights: &'a [T]) -> &'a [T] {
        let (groups, each) = (self.stride / self.run, if self.splat { 1 } else { self.run });
        let group = if self.tied { j } else { block * groups + j };
        &weights[group * each..][..each]
    }
}

/// Numbers that begin at a cache line, which keeps every vector within one.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    numbers: Vec<f32>,
    start: usize,
}

impl Aligned {
    const LINE: usize = 16;

    fn new(values: &[f32]) -> Self {
        let mut aligned = Self::default();
        aligned.grow(values.len());
        aligned.numbers[aligned.start..][..values.len()].copy_from_slice(values);
        aligned
    }

    fn grow(&mut self, len: usize) {
        if self.numbers.len() < len + Self::LINE {
            self.numbers = vec![0.0; len + Self::LINE];
            self.start = self.numbers.as_ptr().align_offset(4 * Self::LINE).min(Self::LINE);
        }
    }

    /// All numbers as rows of `W`; up to a line of zeros follows them.
    pub fn chunks<const W: usize>(&self) -> &[[f32; W]] {
        self.numbers[self.start..].as_chunks().0
    }

    fn first(&mut self, len: usize) -> &mut [f32] {
        &mut self.numbers[self.start..][..len]
    }
}

/// Memory that [`Plan::apply`] uses again.
#[derive(Debug, Default)]
pub struct PlanRoom {
    /// Real and imaginary parts in transposed order.
    across: [Aligned; 2],
    /// Real and imaginary parts in natural order.
    along: [Aligned; 2],
}

impl Plan {
    /// Lays out the weights of `steps`, which are applied in order.
    ///
    /// # Errors
    /// A size that is no power of two from 2 on; weights or an index of another length than the shape has, an index out
    /// of range; a relaxed permutation.
    pub fn new(shape: &Shape, steps: &[Step<f32>]) -> Result<Self> {
        let (n, fault) = (shape.size, |why: String| Error::usage("plan", why));
        if !n.is_power_of_two() || n < 2 {
            return Err(fault(format!("{n} is no power of two from 2 on")));
        }
        let width = match n {
            256.. => 16,
            64.. => 8,
            _ => 1,
        };
        let identity = || (0..n as u32).collect::<Vec<_>>();
        let (mut stages, mut pending): (Vec<Stage>, Option<Vec<u32>>) = (vec![], None);
        for step in steps {
            match step {
                Step::Butterfly(w) if w.len() == shape.butterfly_len() => {
                    let before = pending.take().unwrap_or_else(identity);
                    stages.push(Stage::new(shape, width, w, &before));
                }
                Step::Butterfly(w) => {
                    let want = shape.butterfly_len();
                    return Err(fault(format!("a butterfly of {} numbers; {n} elements need {want}", w.len())));
                }
                Step::Permutation(index) => {
                    if index.len() != n || index.iter().any(|i| *i as usize >= n) {
                        return Err(fault(format!("a permutation that is not of {n} elements")));
                    }
                    let before = pending.take().unwrap_or_else(identity);
                    pending = Some(index.iter().map(|i| before[*i as usize]).collect());
                }
                Step::Relaxed(_) => return Err(fault("a relaxed permutation; harden it".into())),
            }
        }
        let shuffles = match width {
            16 => shuffles::<16>(),
            8 => shuffles::<8>(),
            _ => false,
        };
        Ok(Self { shape: *shape, width, stages, last: pending, shuffles })
    }

    /// Size and field.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Multiplies a vector, given as real parts and, if it is complex, imaginary parts. Without a place for imaginary
    /// parts of the result they are not computed.
    ///
    /// # Errors
    /// A slice whose length is not `N`.
    pub fn apply(
        &self,
        (re, im): (&[f32], Option<&[f32]>),
        (to_re, to_im): (&mut [f32], Option<&mut [f32]>),
        room: &mut PlanRoom,
    ) -> Result<()> {
        let lengths = [Some(re.len()), im.map(<[f32]>::len), Some(to_re.len()), to_im.as_ref().map(|to| to.len())];
        if let Some(other) = lengths.into_iter().flatten().find(|l| *l != self.shape.size) {
            return Err(Error::usage("plan", format!("{other} numbers for a vector of {}", self.shape.size)));
        }
        room.across.iter_mut().chain(&mut room.along).for_each(|a| a.grow(self.shape.size));
        if self.shape.complex {
            dispatch(self.width, Apply { plan: self, from: (re, im), to: (to_re, to_im), room });
            return Ok(());
        }
        // Real factors leave real and imaginary parts apart.
        dispatch(self.width, Apply { plan: self, from: (re, None), to: (to_re, None), room });
        match (im, to_im) {
            (Some(im), Some(to)) => dispatch(self.width, Apply { plan: self, from: (im, None), to: (to, None), room }),
            (None, Some(to)) => to.fill(0.0),
            _ => (),
        }
        Ok(())
    }
}

/// Runs with vectors of up to `width` elements.
fn dispatch<T>(width: usize, op: impl WithSimd<Output = T>) -> T {
    #[cfg(target_arch = "x86_64")]
    if width == 8 {
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Simd::vectorize(simd, op);
        }
    }
    let _ = width;
    Arch::new().dispatch(op)
}

/// Whether a tile is transposed by the machine's shuffles as it is one by one.
fn shuffles<const W: usize>() -> bool {
    let tile: Vec<[f32; W]> = (0..W).map(|r| std::array::from_fn(|t| (r * W + t) as f32)).collect();
    let mut turned = tile.clone();
    dispatch(W, Untranspose { from: &tile, to: &mut turned, shuffles: true });
    (0..W).all(|r| (0..W).all(|t| turned[t][r] == tile[r][t]))
}

impl Stage {
    fn new(shape: &Shape, width: usize, weights: &[f32], before: &[u32]) -> Self {
        let (n, inner) = (shape.size, width.trailing_zeros() as usize);
        let index = (0..n).map(|at| before[transposed(n, width, at)]).collect();
        let passes = [(0..inner, true), (inner..shape.levels(), false)].map(|(levels, across)| {
            let mut passes = vec![];
            let mut level = levels.start;
            while level < levels.end {
                let merged = (levels.end - level) % 2 == 0;
                passes.push(Pass::new(shape, width, weights, level, merged, across));
                level += 1 + usize::from(merged);
            }
            passes
        });
        Self { index, passes }
    }
}

/// The element at a place of the transposed order.
fn transposed(n: usize, width: usize, at: usize) -> usize {
    let columns = n / width;
    at % columns * width + at / columns
}

impl Pass {
    fn new(shape: &Shape, width: usize, weights: &[f32], level: usize, merged: bool, across: bool) -> Self {
        let (n, half) = (shape.size, 1 << level);
        let run = if across { n / width / width } else { half / width };
        let stride = if across { half * run } else { run };
        let (splat, tied) = (shape.tied && across, shape.tied);
        let mut pass = Self { merged, stride, run, splat, tied, weights: Aligned::default() };
        let element = |vector: usize, lane: usize| match across {
            true => transposed(n, width, vector * width + lane),
            false => vector * width + lane,
        };
        // The first elements and levels of the 2 x 2 matrices that meet at an element.
        let pairs: &[(usize, usize)] = match merged {
            true => &[(0, 0), (2, 0), (0, 1), (1, 1)],
            false => &[(0, 0)],
        };
        let starts: Vec<usize> =
            (0..shape.levels()).scan(0, |at, l| Some(std::mem::replace(at, *at + shape.factor_len(l)))).collect();
        let (mut rows, block) = (vec![], if merged { 4 } else { 2 } * stride);
        let blocks = if shape.tied { 1 } else { n / width / block };
        for start in (0..blocks).flat_map(|b| (0..stride).step_by(run).map(move |j| b * block + j)) {
            for vector in start..start + if splat { 1 } else { run } {
                for (offset, above) in pairs {
                    for number in 0..4 * shape.planes() {
                        rows.extend((0..width).map(|lane| {
                            let (i, level) = (element(vector, lane) + offset * half, level + above);
                            let j = i % (1 << level);
                            let pair = pair_of(shape, i >> (level + 1) << (level + 1), j);
                            weights[starts[level] + 4 * shape.planes() * pair + number]
                        }));
                    }
                }
            }
        }
        pass.weights = Aligned::new(&rows);
        pass
    }
}

/// One application, with the widest vectors of the machine.
struct Apply<'a> {
    plan: &'a Plan,
    from: (&'a [f32], Option<&'a [f32]>),
    to: (&'a mut [f32], Option<&'a mut [f32]>),
    room: &'a mut PlanRoom,
}

impl WithSimd for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.plan.width {
            16 => self.wide::<S, 16>(simd),
            8 => self.wide::<S, 8>(simd),
            _ => self.wide::<S, 1>(simd),
        }
    }
}

impl Apply<'_> {
    #[inline(always)]
    fn wide<S: Simd, const W: usize>(self, simd: S) {
        let Self { plan, from, to, room } = self;
        let (n, complex) = (plan.shape.size, plan.shape.complex);
        let ([across_re, across_im], [along_re, along_im]) = (&mut room.across, &mut room.along);
        let [across_re, across_im, along_re, along_im] = [across_re, across_im, along_re, along_im].map(|a| a.first(n));
        if plan.stages.is_empty() {
            along_re.copy_from_slice(from.0);
            along_im.iter_mut().enumerate().for_each(|(i, to)| *to = from.1.map_or(0.0, |im| im[i]));
        }
        for (s, stage) in plan.stages.iter().enumerate() {
            let mut real = s == 0 && from.1.is_none();
            match (s, from.1) {
                (0, im) => {
                    gather(across_re, from.0, &stage.index);
                    im.into_iter().for_each(|im| gather(across_im, im, &stage.index));
                }
                _ => {
                    gather(across_re, along_re, &stage.index);
                    if complex {
                        gather(across_im, along_im, &stage.index);
                    }
                }
            }
            // The last pass skips imaginary parts that are not asked for.
            let half = to.1.is_none() && s + 1 == plan.stages.len();
            let [across, along] = &stage.passes;
            run_all::<S, W>(simd, across, [rows(across_re), rows(across_im)], complex, &mut real, false);
            untranspose::<S, W>(simd, rows(across_re), rows(along_re), plan.shuffles);
            if complex && !real {
                untranspose::<S, W>(simd, rows(across_im), rows(along_im), plan.shuffles);
            }
            run_all::<S, W>(simd, along, [rows(along_re), rows(along_im)], complex, &mut real, half);
        }
        let finish = |to: &mut [f32], from: &[f32]| match &plan.last {
            Some(index) => gather(to, from, index),
            None => to.copy_from_slice(from),
        };
        finish(to.0, along_re);
        to.1.into_iter().for_each(|to| finish(to, along_im));
    }
}

fn rows<const W: usize>(numbers: &mut [f32]) -> &mut [[f32; W]] {
    numbers.as_chunks_mut().0
}

#[inline(always)]
fn untranspose<S: Simd, const W: usize>(simd: S, from: &[[f32; W]], to: &mut [[f32; W]], shuffles: bool) {
    match W {
        1 => to.copy_from_slice(from),
        _ => simd.vectorize(Untranspose { from, to, shuffles }),
    }
}

/// Runs passes; `real` is whether no pass has made the vector complex so far, `half` whether the last one need not.
#[inline(always)]
fn run_all<S: Simd, const W: usize>(
    simd: S,
    passes: &[Pass],
    [re, im]: [&mut [[f32; W]]; 2],
    complex: bool,
    real: &mut bool,
    half: bool,
) {
    for (i, pass) in passes.iter().enumerate() {
        let (re, im) = (&mut *re, &mut *im);
        match (complex, std::mem::take(real), half && i + 1 == passes.len()) {
            (false, ..) => simd.vectorize(Run::<W, false, false, false> { pass, re, im }),
            (true, false, false) => simd.vectorize(Run::<W, true, false, false> { pass, re, im }),
            (true, true, false) => simd.vectorize(Run::<W, true, true, false> { pass, re, im }),
            (true, false, true) => simd.vectorize(Run::<W, true, false, true> { pass, re, im }),
            (true, true, true) => simd.vectorize(Run::<W, true, true, true> { pass, re, im }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{forward, hardened, Kept};
    use super::*;
    use rand::{rngs::StdRng, Rng, SeedableRng};

    /// A random product; `modules` in the order of application.
    struct Drawn {
        shape: Shape,
        modules: Vec<char>,
        factors: Vec<Vec<f32>>,
        permutations: Vec<Vec<u32>>,
    }

    impl Drawn {
        fn new(shape: Shape, modules: &str, rng: &mut StdRng) -> Self {
            let scale = if shape.complex { 0.9 } else { 1.2 };
            let mut drawn = Self { shape, modules: modules.chars().collect(), factors: vec![], permutations: vec![] };
            for module in modules.chars() {
                let mut random = |n: usize| (0..n).map(|_| rng.random_range(-scale..scale)).collect::<Vec<f32>>();
                match module {
                    'B' => drawn.factors.push(random(shape.butterfly_len())),
                    _ => drawn.permutations.push(hardened(shape.size, &random(shape.permutation_len()))),
                }
            }
            drawn
        }

        fn steps<'a, T: super::super::Real>(&'a self, factors: &'a [Vec<T>]) -> Vec<Step<'a, T>> {
            let (mut b, mut p) = (factors.iter(), self.permutations.iter());
            let step = |m: &char| match m {
                'B' => Step::Butterfly(b.next().expect("a butterfly")),
                _ => Step::Permutation(p.next().expect("a permutation")),
            };
            self.modules.iter().map(step).collect()
        }

        /// Real and imaginary parts of the product with a vector, in f64.
        fn expected(&self, re: &[f32], im: Option<&[f32]>) -> [Vec<f64>; 2] {
            let n = self.shape.size;
            let wide: Vec<Vec<f64>> = self.factors.iter().map(|f| f.iter().map(|w| f64::from(*w)).collect()).collect();
            let run = |re: &[f32], im: Option<&[f32]>| -> Vec<f64> {
                let mut x = vec![[0f64]; self.shape.planes() * n];
                x.iter_mut().zip(re.iter().chain(im.into_iter().flatten())).for_each(|(x, v)| x[0] = f64::from(*v));
                forward(&self.shape, &self.steps(&wide), &mut x, &mut Kept::default());
                x.into_iter().flatten().collect()
            };
            match self.shape.complex {
                true => {
                    let both = run(re, im);
                    [both[..n].to_vec(), both[n..].to_vec()]
                }
                false => [run(re, None), im.map_or(vec![0.0; n], |im| run(im, None))],
            }
        }
    }

    #[test]
    fn a_plan_multiplies_as_the_steps_do() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(4);
        let mut room = PlanRoom::default();
        for size in (1..=11).map(|l| 1 << l) {
            for (complex, tied) in [(false, false), (false, true), (true, false), (true, true)] {
                for modules in ["PB", "B", "PPB", "PBPB", "BB", "BP", "PBPP", "P"] {
                    let shape = Shape { size, complex, tied };
                    let drawn = Drawn::new(shape, modules, &mut rng);
                    let plan = Plan::new(&shape, &drawn.steps(&drawn.factors))?;
                    let [re, im] = [0; 2].map(|_| (0..size).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>());
                    for im in [None, Some(&im[..])] {
                        let want = drawn.expected(&re, im);
                        let scale = want.iter().flatten().fold(0f64, |most, x| most.max(x.abs()));
                        let check = |got: &[f32], want: &[f64], part: &str| {
                            let far = got.iter().zip(want).fold(0f64, |m, (g, w)| m.max((f64::from(*g) - w).abs()));
                            assert!(far <= 2e-6 * scale, "{part} of {modules}, {shape:?}: {far:e} of {scale:e}");
                        };
                        let [mut to_re, mut to_im] = [vec![f32::NAN; size], vec![f32::NAN; size]];
                        plan.apply((&re, im), (&mut to_re, Some(&mut to_im)), &mut room)?;
                        check(&to_re, &want[0], "real part");
                        check(&to_im, &want[1], "imaginary part");
                        to_re.fill(f32::NAN);
                        plan.apply((&re, im), (&mut to_re, None), &mut room)?;
                        check(&to_re, &want[0], "real part alone");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_makes_no_plan_is_refused() {
        let shape = Shape { size: 8, complex: false, tied: true };
        let logits = [0f32; 9];
        let refused = |shape: Shape, step: Step<f32>| Plan::new(&shape, &[step]).expect_err("refused").to_string();
        assert!(refused(shape, Step::Relaxed(&logits)).contains("relaxed"));
        assert!(refused(shape, Step::Butterfly(&logits)).contains("9 numbers; 8 elements need 28"));
        assert!(refused(shape, Step::Permutation(&[0, 1, 2, 3, 4, 5, 6, 8])).contains("not of 8"));
        assert!(refused(Shape { size: 6, ..shape }, Step::Permutation(&[0; 6])).contains("power of two"));
        let plan = Plan::new(&shape, &[Step::Permutation(&[0, 1, 2, 3, 4, 5, 6, 7])]).expect("a plan");
        let short = plan.apply((&[0.0; 8], None), (&mut [0.0; 7], None), &mut PlanRoom::default());
        assert!(short.expect_err("refused").to_string().contains("7 numbers for a vector of 8"));
    }
}
