//! What `learn` is given: a known transform, or a file with a matrix or with pairs of inputs and outputs.

use super::arrays::{Array, Arrays};
use crate::error::{Error, Result};
use crate::transforms::{Examples, Matrix, Pairs, Transform, Vectors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;

/// A target, on the unitary scale.
pub(crate) struct Target {
    /// Of the transform, or of the file.
    pub name: String,
    pub n: usize,
    /// Modules by default, and whether their factors are complex.
    pub product: (&'static str, bool),
    pub file: Option<TargetFile>,
    data: Data,
}

enum Data {
    Matrix(Matrix),
    Pairs(Pairs),
}

/// The file that was learned, in result.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TargetFile {
    /// Name without folders.
    pub file: String,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// Number of pairs; null of a matrix.
    pub pairs: Option<usize>,
    /// What the target was divided by to bring it to the unitary scale, and the factors are multiplied by.
    pub scale: f64,
}

impl Target {
    /// A transform with a known matrix.
    pub fn known(transform: Transform, n: usize, seed: u64) -> Self {
        let data = Data::Matrix(transform.matrix(n, seed));
        Self { name: transform.name().into(), n, product: transform.product(), file: None, data }
    }

    /// A file: pairs where it has tensors `input` and `output`, else a matrix.
    ///
    /// # Errors
    /// A file that cannot be read; a matrix that is not square, a size that is no power of two, inputs and outputs of
    /// different shapes, no pair, numbers that are not finite, only zeros.
    pub fn of_file(path: &Path, tensor: Option<&str>) -> Result<Self> {
        let flag = "--target";
        let place = format!("{flag} {}", path.display());
        let arrays = Arrays::open(path, flag)?;
        let has_pairs = tensor.is_none()
            && ["input", "output"].iter().all(|n| arrays.names().is_ok_and(|all| all.iter().any(|a| a == n)));
        let (data, scale) = match has_pairs {
            true => {
                let mut pairs = pairs(arrays.get(Some("input"))?, arrays.get(Some("output"))?, &place)?;
                let scale = pairs.normalise();
                (Data::Pairs(pairs), scale)
            }
            false => {
                let mut matrix = matrix(arrays.get(tensor)?, &place)?;
                let scale = matrix.normalise();
                (Data::Matrix(matrix), scale)
            }
        };
        if !scale.is_finite() || scale == 0.0 {
            return Err(Error::tensor(place, "has nothing but zeros"));
        }
        let (n, pairs) = match &data {
            Data::Matrix(matrix) => (matrix.size, None),
            Data::Pairs(pairs) => (pairs.size, Some(pairs.count)),
        };
        let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let sha256 = Sha256::digest(&arrays.bytes).iter().map(|b| format!("{b:02x}")).collect();
        let about = TargetFile { file: file.clone(), sha256, pairs, scale };
        Ok(Self { name: file, n, product: ("BPBP", true), file: Some(about), data })
    }

    /// The matrix, where that is what it is.
    pub fn matrix(&self) -> Option<&Matrix> {
        match &self.data {
            Data::Matrix(matrix) => Some(matrix),
            Data::Pairs(_) => None,
        }
    }

    /// What a product is compared with.
    pub fn examples(&self) -> Examples<'_> {
        match &self.data {
            Data::Matrix(matrix) => matrix.into(),
            Data::Pairs(pairs) => pairs.into(),
        }
    }
}

fn matrix(array: Array, place: &str) -> Result<Matrix> {
    let [rows, columns] = array.shape[..] else {
        return Err(Error::tensor(place, format!("has the shape {:?}; a matrix is [N, N]", array.shape)));
    };
    if rows != columns {
        return Err(Error::tensor(place, format!("is no square matrix: {rows} rows, {columns} columns")));
    }
    check_size(rows, place)?;
    Ok(Matrix { size: rows, re: array.re, im: array.im })
}

fn pairs(input: Array, output: Array, place: &str) -> Result<Pairs> {
    let shapes = format!("`input` {:?} and `output` {:?}", input.shape, output.shape);
    let [count, size] = input.shape[..] else {
        return Err(Error::tensor(place, format!("has {shapes}; both are [pairs, N]")));
    };
    if input.shape != output.shape {
        return Err(Error::tensor(place, format!("has {shapes}; both are [pairs, N] alike")));
    }
    if count == 0 {
        return Err(Error::tensor(place, format!("has no pair: {shapes}")));
    }
    check_size(size, place)?;
    let vectors = |array: Array| Vectors { re: array.re, im: array.im };
    Ok(Pairs { size, count, input: vectors(input), output: vectors(output) })
}

fn check_size(n: usize, place: &str) -> Result<()> {
    match n.is_power_of_two() && n >= 2 {
        true => Ok(()),
        false => Err(Error::tensor(place, format!("has a size of {n}, which is no power of two of at least 2"))),
    }
}
