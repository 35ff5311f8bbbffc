//! Arrays of NumPy (`.npy`, `.npz`) and safetensors files, real and complex.

use crate::error::{At, Error, ErrorKind, Result};
use npyz::{NpyFile, Order, WriterBuilder};
use num_complex::Complex;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::io::Read;
use std::path::Path;

/// Real or complex numbers of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    pub shape: Vec<usize>,
    pub re: Vec<f64>,
    /// Imaginary parts of complex numbers.
    pub im: Option<Vec<f64>>,
    /// Whether the file has f64 rather than f32.
    pub wide: bool,
}

/// A kind of file, by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Npy,
    Npz,
    Safetensors,
}

impl Format {
    /// # Errors
    /// Another ending.
    pub fn of(path: &Path, flag: &str) -> Result<Self> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("npy") => Ok(Self::Npy),
            Some("npz") => Ok(Self::Npz),
            Some("safetensors") => Ok(Self::Safetensors),
            _ => {
                let message = "is no .npy, .npz or .safetensors file";
                Err(Error::unsupported(format!("{flag} {}", path.display()), message))
            }
        }
    }
}

/// A file of arrays, whole in memory.
pub(super) struct Arrays {
    place: String,
    format: Format,
    pub bytes: Vec<u8>,
}

impl Arrays {
    /// # Errors
    /// A file that cannot be read or has another ending than those of [`Format`].
    pub fn open(path: &Path, flag: &str) -> Result<Self> {
        let place = format!("{flag} {}", path.display());
        let format = Format::of(path, flag)?;
        let bytes = std::fs::read(path).at(&place)?;
        Ok(Self { place, format, bytes })
    }

    /// Names of the arrays; none of a `.npy` file, whose array has no name.
    ///
    /// # Errors
    /// A malformed file.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = match self.format {
            Format::Npy => vec![],
            Format::Npz => {
                let archive = zip::ZipArchive::new(std::io::Cursor::new(&self.bytes)).map_err(|e| self.malformed(e))?;
                let plain = |n: &str| n.strip_suffix(".npy").unwrap_or(n).to_string();
                archive
                    .file_names()
                    .map(|n| n.map(|n| plain(&n)).map_err(|e| self.malformed(e)))
                    .collect::<Result<_>>()?
            }
            Format::Safetensors => self.tensors()?.names().into_iter().map(String::from).collect(),
        };
        names.sort_unstable();
        Ok(names)
    }

    /// The array `name`; without a name the only array of the file.
    ///
    /// # Errors
    /// A malformed file, no such array, several where none is named, an element type that is neither f32 nor f64 nor
    /// complex; a number that is NaN or infinite.
    pub fn get(&self, name: Option<&str>) -> Result<Array> {
        let names = self.names()?;
        let name = match (name, &names[..]) {
            (name, []) if self.format == Format::Npy => name.unwrap_or("array"),
            (Some(name), _) if names.iter().any(|n| n == name) => name,
            (Some(name), _) => {
                let message = format!("has no tensor `{name}`; it has {}", listed(&names));
                return Err(Error::tensor(&self.place, message));
            }
            (None, [only]) => only,
            (None, _) => {
                let message = format!("has {}; name one with --tensor", listed(&names));
                return Err(Error::tensor(&self.place, message));
            }
        };
        let array = match self.format {
            Format::Npy => self.npy(&self.bytes)?,
            Format::Npz => self.npy(&self.member(name)?)?,
            Format::Safetensors => self.tensor(name)?,
        };
        let numbers = || array.re.iter().zip(array.im.iter().flatten().chain(std::iter::repeat(&0.0)));
        if let Some(at) = numbers().position(|(re, im)| !re.is_finite() || !im.is_finite()) {
            let value = if array.re[at].is_nan() || numbers().nth(at).is_some_and(|(_, im)| im.is_nan()) {
                "NaN"
            } else {
                "infinite"
            };
            let message = format!("element {:?} of `{name}` is {value}", place_of(&array.shape, at));
            return Err(Error::new(ErrorKind::NotFinite, &self.place, message));
        }
        Ok(array)
    }

    fn malformed(&self, why: impl std::fmt::Display) -> Error {
        Error::format(&self.place, why)
    }

    fn member(&self, name: &str) -> Result<Vec<u8>> {
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&self.bytes)).map_err(|e| self.malformed(e))?;
        let mut file = match archive.by_name(&format!("{name}.npy")) {
            Err(zip::result::ZipError::FileNotFound) => return Err(self.malformed(format!("`{name}` is no .npy file"))),
            other => other.map_err(|e| self.malformed(e))?,
        };
        let mut bytes = vec![];
        file.read_to_end(&mut bytes).map_err(|e| self.malformed(e))?;
        Ok(bytes)
    }

    fn npy(&self, bytes: &[u8]) -> Result<Array> {
        let fail = |e: std::io::Error| self.malformed(format!("is no whole .npy file: {e}"));
        let file = NpyFile::new(bytes).map_err(fail)?;
        let shape: Vec<usize> = file.shape().iter().map(|d| *d as usize).collect();
        // A header that claims more than the file has would be allocated for.
        let claimed = shape.iter().try_fold(1usize, |all, d| all.checked_mul(*d));
        if claimed.is_none_or(|elements| elements > bytes.len()) {
            return Err(self.malformed(format!("claims the shape {shape:?}, for which it is too short")));
        }
        let (order, dtype) = (file.order(), file.dtype());
        let (re, im, wide) = match file.try_data::<f32>() {
            Ok(data) => (wide_of(data).map_err(fail)?, None, false),
            Err(file) => match file.try_data::<f64>() {
                Ok(data) => (data.collect::<std::io::Result<_>>().map_err(fail)?, None, true),
                Err(file) => match file.try_data::<Complex<f32>>() {
                    Ok(data) => {
                        let all: Vec<Complex<f32>> = data.collect::<std::io::Result<_>>().map_err(fail)?;
                        let part = |of: fn(&Complex<f32>) -> f32| all.iter().map(|z| f64::from(of(z))).collect();
                        (part(|z| z.re), Some(part(|z| z.im)), false)
                    }
                    Err(file) => match file.try_data::<Complex<f64>>() {
                        Ok(data) => {
                            let all: Vec<Complex<f64>> = data.collect::<std::io::Result<_>>().map_err(fail)?;
                            (all.iter().map(|z| z.re).collect(), Some(all.iter().map(|z| z.im).collect()), true)
                        }
                        Err(_) => return Err(self.no_type(&dtype.descr())),
                    },
                },
            },
        };
        let array = Array { shape, re, im, wide };
        match order {
            Order::C => Ok(array),
            Order::Fortran => self.by_rows(array),
        }
    }

    /// An array of one or two dimensions whose columns came first.
    fn by_rows(&self, array: Array) -> Result<Array> {
        let (rows, columns) = match array.shape[..] {
            [_] => return Ok(array),
            [rows, columns] => (rows, columns),
            _ => return Err(Error::unsupported(&self.place, "is in Fortran's order and has more than two dimensions")),
        };
        let turn = |of: Vec<f64>| (0..rows * columns).map(|at| of[at % columns * rows + at / columns]).collect();
        Ok(Array { re: turn(array.re), im: array.im.map(turn), ..array })
    }

    fn no_type(&self, name: &str) -> Error {
        Error::unsupported(&self.place, format!("has elements of type {name}; f32, f64 and complex are read"))
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|e| self.malformed(format!("is no whole safetensors file: {e}")))
    }

    fn tensor(&self, name: &str) -> Result<Array> {
        let tensors = self.tensors()?;
        let view = tensors.tensor(name).map_err(|e| self.malformed(e))?;
        let narrow = || view.data().as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
        let shape = view.shape().to_vec();
        match view.dtype() {
            Dtype::F32 => Ok(Array { shape, re: narrow().collect(), im: None, wide: false }),
            Dtype::C64 => {
                let (re, im) = (narrow().step_by(2).collect(), narrow().skip(1).step_by(2).collect());
                Ok(Array { shape, re, im: Some(im), wide: false })
            }
            Dtype::F64 => {
                let re = view.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
                Ok(Array { shape, re, im: None, wide: true })
            }
            other => Err(self.no_type(&other.to_string())),
        }
    }
}

fn wide_of(data: impl Iterator<Item = std::io::Result<f32>>) -> std::io::Result<Vec<f64>> {
    data.map(|x| x.map(f64::from)).collect()
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "none".into(),
        _ => names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "),
    }
}

/// The index of an element in an array, row-major.
fn place_of(shape: &[usize], mut at: usize) -> Vec<usize> {
    let mut place = vec![0; shape.len()];
    for (place, size) in place.iter_mut().zip(shape).rev() {
        (*place, at) = (at % size, at / size);
    }
    place
}

/// The bytes of a file that holds `array`: `output` of safetensors.
///
/// safetensors has no complex numbers of f64: they become f32.
///
/// # Errors
/// A `.npz` file, which has no one array.
pub(super) fn bytes_of(array: &Array, format: Format, place: &str) -> Result<Vec<u8>> {
    match format {
        Format::Npy => npy_bytes(array).at(place),
        Format::Npz => Err(Error::unsupported(place, "is .npz; a result is written as .npy or .safetensors")),
        Format::Safetensors => {
            let narrow = |x: &f64| (*x as f32).to_le_bytes();
            let (dtype, bytes): (_, Vec<u8>) = match (&array.im, array.wide) {
                (Some(im), _) => {
                    (Dtype::C64, array.re.iter().zip(im).flat_map(|(a, b)| [narrow(a), narrow(b)]).flatten().collect())
                }
                (None, false) => (Dtype::F32, array.re.iter().flat_map(narrow).collect()),
                (None, true) => (Dtype::F64, array.re.iter().flat_map(|x| x.to_le_bytes()).collect()),
            };
            let view = TensorView::new(dtype, array.shape.clone(), &bytes).map_err(|e| Error::format(place, e))?;
            safetensors::serialize([("output", view)], None).map_err(|e| Error::format(place, e))
        }
    }
}

fn npy_bytes(array: &Array) -> std::io::Result<Vec<u8>> {
    fn write<T: npyz::AutoSerialize>(shape: &[u64], all: impl Iterator<Item = T>) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![];
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut bytes).begin_nd()?;
        writer.extend(all)?;
        writer.finish()?;
        Ok(bytes)
    }
    let shape: Vec<u64> = array.shape.iter().map(|d| *d as u64).collect();
    let re = array.re.iter().copied();
    match (&array.im, array.wide) {
        (None, false) => write(&shape, re.map(|x| x as f32)),
        (None, true) => write(&shape, re),
        (Some(im), false) => write(&shape, re.zip(im).map(|(a, b)| Complex::new(a as f32, *b as f32))),
        (Some(im), true) => write(&shape, re.zip(im).map(|(a, b)| Complex::new(a, *b))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(bytes: Vec<u8>, format: Format) -> Arrays {
        Arrays { place: "--input x".into(), format, bytes }
    }

    #[test]
    fn arrays_are_read_as_they_were_written() -> Result<()> {
        let numbers = |from: f64| (0..6).map(|i| from + f64::from(i)).collect::<Vec<_>>();
        for wide in [false, true] {
            for im in [None, Some(numbers(-3.0))] {
                let array = Array { shape: vec![2, 3], re: numbers(0.5), im, wide };
                let npy = bytes_of(&array, Format::Npy, "x")?;
                assert_eq!(opened(npy.clone(), Format::Npy).get(None)?, array);
                let got =
                    opened(bytes_of(&array, Format::Safetensors, "x")?, Format::Safetensors).get(Some("output"))?;
                assert_eq!(got, Array { wide: wide && array.im.is_none(), ..array.clone() });
                // Columns first, as NumPy writes a transposed array: the same length of header.
                let text = String::from_utf8_lossy(&npy[..128]).replace("False", "True ");
                let at = text.find("True ").expect("an order");
                let mut turned = npy.clone();
                turned[at - (text.len() - 128)..][..5].copy_from_slice(b"True ");
                let got = opened(turned, Format::Npy).get(None)?;
                assert_eq!(got.re, [0.5, 2.5, 4.5, 1.5, 3.5, 5.5]);
            }
        }
        Ok(())
    }

    #[test]
    fn a_compressed_archive_is_read_by_name() -> Result<()> {
        use std::io::Write;
        let of = |x: f64| Array { shape: vec![2], re: vec![x, -x], im: None, wide: true };
        let mut archive = zip::ZipWriter::new(std::io::Cursor::new(vec![]));
        let deflated = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        for (name, x) in [("output", 2.0), ("input", 1.0)] {
            archive.start_file(format!("{name}.npy"), deflated).expect("a member");
            archive.write_all(&bytes_of(&of(x), Format::Npy, "x")?).at("archive")?;
        }
        let archive = opened(archive.finish().expect("an archive").into_inner(), Format::Npz);
        assert_eq!(archive.names()?, ["input", "output"]);
        assert_eq!((archive.get(Some("input"))?, archive.get(Some("output"))?), (of(1.0), of(2.0)));
        assert!(archive.get(None).expect_err("two").to_string().contains("has `input`, `output`; name one"));
        Ok(())
    }

    #[test]
    fn bad_files_are_named() -> Result<()> {
        let array = Array { shape: vec![2, 2], re: vec![1.0, 2.0, f64::NAN, 4.0], im: None, wide: false };
        let says = |bytes: Vec<u8>, format: Format, name: Option<&str>, why: &str| {
            let said = opened(bytes, format).get(name).expect_err("refused").to_string();
            assert!(said.starts_with("--input x: ") && said.contains(why), "{said}");
        };
        let (npy, tensors) = (bytes_of(&array, Format::Npy, "x")?, bytes_of(&array, Format::Safetensors, "x")?);
        says(npy.clone(), Format::Npy, None, "element [1, 0] of `array` is NaN");
        says(npy[..npy.len() - 3].to_vec(), Format::Npy, None, "no whole .npy file");
        says(tensors.clone(), Format::Safetensors, Some("input"), "has no tensor `input`; it has `output`");
        says(tensors[..tensors.len() - 3].to_vec(), Format::Safetensors, None, "no whole safetensors file");
        says(b"PK".to_vec(), Format::Npz, None, "");
        Ok(())
    }
}
