//! `bfly-transforms apply`: vectors of a file through a learned product.

use super::arrays::{bytes_of, Array, Arrays, Format};
use super::stored::Stored;
use crate::cli::{print, Output};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::factored::PlanRoom;
use clap::Args;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Flags of `bfly-transforms apply`.
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// Directory that `learn` wrote, or its factors.safetensors.
    #[arg(long, value_name = "DIR|FILE")]
    pub factors: PathBuf,
    /// Vectors, `[N]` or `[batch, N]`: a .npy, .npz or .safetensors file of f32, f64 or complex numbers.
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Name of the tensor, if the file has several.
    #[arg(long, value_name = "NAME")]
    pub tensor: Option<String>,
    /// File to write the products to, .npy or .safetensors, with the shape and precision of the input.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

pub(super) fn run(args: &ApplyArgs) -> Result<()> {
    let stored = Stored::read(&args.factors, "--factors")?;
    let (format, place) = (Format::of(&args.out, "--out")?, format!("--out {}", args.out.display()));
    if format == Format::Npz {
        return Err(Error::unsupported(place, "is .npz; a result is written as .npy or .safetensors"));
    }
    let output = Output::reserve_replacing(&args.out, "--out", |_| Ok(fault(&args.out, &args.input, format)))?;
    let input = Arrays::open(&args.input, "--input")?.get(args.tensor.as_deref())?;
    let result = product(&stored, &input, &format!("--input {}", args.input.display()))?;
    output.write(&bytes_of(&result, format, &place)?)?;
    let kind = if result.im.is_some() { "complex" } else { "real" };
    let count = result.re.len() / stored.facts.n;
    print(format!("{count} vectors of {}, {kind}: {}\n", stored.facts.n, args.out.display()))
}

/// Why the file at `--out` is not overwritten, if for a reason.
fn fault(out: &Path, input: &Path, format: Format) -> Option<String> {
    if out.canonicalize().ok().is_some_and(|out| input.canonicalize().is_ok_and(|input| input == out)) {
        return Some("is the input".into());
    }
    let mut first = [0; 6];
    let mut is_npy =
        || std::fs::File::open(out).and_then(|mut f| f.read_exact(&mut first)).is_ok() && first == *b"\x93NUMPY";
    match format {
        Format::Safetensors => {
            let ours = Arrays::open(out, "--out").and_then(|a| a.names()).is_ok_and(|names| names == ["output"]);
            (!ours).then(|| "is not a safetensors file of `output` alone; only an earlier result is overwritten".into())
        }
        _ => (!is_npy()).then(|| "is not a .npy file; only a .npy file is overwritten".into()),
    }
}

/// The products of all vectors.
fn product(stored: &Stored, input: &Array, place: &str) -> Result<Array> {
    let facts = &stored.facts;
    let n = facts.n;
    if !matches!(input.shape[..], [size] | [_, size] if size == n) {
        let message =
            format!("has the shape {:?}; {} of {n} takes [{n}] or [batch, {n}]", input.shape, facts.transform);
        return Err(Error::tensor(place, message));
    }
    if input.im.is_some() && !facts.complex_target {
        let message = format!("is complex, and {} is real: give real and imaginary parts one by one", facts.transform);
        return Err(Error::tensor(place, message));
    }
    let narrow = |of: &[f64]| of.iter().map(|x| *x as f32).collect::<Vec<f32>>();
    let (re, im) = (narrow(&input.re), input.im.as_deref().map(narrow));
    if let Some(at) = re.iter().chain(im.iter().flatten()).position(|x| !x.is_finite()) {
        let message = format!("vector {} has a number beyond f32, in which products are computed", at % re.len() / n);
        return Err(Error::new(ErrorKind::NotFinite, place, message));
    }
    let (plan, mut room) = (stored.plan()?, PlanRoom::default());
    let mut to_re = vec![0f32; re.len()];
    let mut to_im = facts.complex_target.then(|| vec![0f32; re.len()]);
    for at in (0..re.len()).step_by(n) {
        let range = at..at + n;
        let im = im.as_ref().map(|im| &im[range.clone()]);
        let to = (&mut to_re[range.clone()], to_im.as_mut().map(|to| &mut to[range.clone()]));
        plan.apply((&re[range.clone()], im), to, &mut room)?;
    }
    let wide = |of: Vec<f32>| of.into_iter().map(f64::from).collect();
    Ok(Array { shape: input.shape.clone(), re: wide(to_re), im: to_im.map(wide), wide: input.wide })
}
