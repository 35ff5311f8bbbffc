//! The calibration that exact recall needs: from a patch, from the user's cache directory, or made by a first run.

use super::output::Output;
use super::Patch;
use crate::checkpoint::{Checkpoint, OnProgress};
use crate::error::{At, Error, ErrorKind, Result};
use crate::recall::{bundled, calibrate, joined, tokenise, Calibration, Positions, LONGEST, TOKENS};
use crate::retrofit::Settings;
use crate::weights::Weights;
use rand::{rngs::StdRng, Rng, SeedableRng};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Sets the calibration of `weights` for exact recall with `settings`: from `patch`, the cache directory, or a
/// calibration on the bundled texts, which is then cached. `tokens` is the length of the text where it is known.
///
/// # Errors
/// A patch's calibration that cannot be read; a calibration that fails.
pub fn prepare(
    weights: &Arc<Weights>,
    checkpoint: &Checkpoint,
    s: &Settings,
    tokens: Option<usize>,
    patch: Option<&Patch>,
    (warn, progress): (&dyn Fn(&str), OnProgress),
) -> Result<()> {
    let spec = &checkpoint.spec;
    if let Some(saved) = patch.and_then(Patch::calibration) {
        weights.calibrate(Calibration::load(&saved, spec)?);
        return Ok(());
    }
    // Where every token is read exactly, codes make no difference.
    if tokens.is_some_and(|n| n <= s.recall + s.window + s.sink_tokens) {
        weights.calibrate(Calibration::neutral(spec, s.sink_tokens));
        return Ok(());
    }
    let cached = cache_file(checkpoint, s.sink_tokens)?;
    if let Some(path) = cached.as_ref().filter(|p| p.exists()) {
        match Calibration::load(path, spec) {
            Ok(calibration) => {
                weights.calibrate(calibration);
                return Ok(());
            }
            Err(e) => warn(&format!("the cached calibration is damaged and is made anew: {e}")),
        }
    }
    let made = make(weights, checkpoint, None, (s.sink_tokens, Positions::Uniform), progress)?;
    if let Some(path) = cached {
        if let Err(e) = save(&path, &made) {
            warn(&format!("the calibration is not cached: {e}"));
        }
    }
    weights.calibrate(made);
    Ok(())
}

/// Calibrates on the documents in `texts`, or on the bundled ones; under [`Positions::Natural`] they are read as texts
/// of the trained length ([`joined`]).
///
/// # Errors
/// A folder without text, a text too short, a tokenizer that fails, or those of [`calibrate`].
pub fn make(
    weights: &Arc<Weights>,
    checkpoint: &Checkpoint,
    texts: Option<&Path>,
    (sink_tokens, positions): (usize, Positions),
    progress: OnProgress,
) -> Result<Calibration> {
    let trained = checkpoint.spec.max_positions;
    let read = texts.map(documents).transpose()?;
    let ids = match &read {
        Some(read) => {
            tokenise(&checkpoint.tokenizer()?, &read.iter().map(String::as_str).collect::<Vec<_>>(), trained)?
        }
        None if checkpoint.has_tokenizer() => tokenise(&checkpoint.tokenizer()?, &bundled(), trained)?,
        None => random_documents(checkpoint.spec.vocab, trained),
    };
    let ids = match positions {
        Positions::Uniform => ids,
        Positions::Natural => joined(&ids, trained),
    };
    let made = calibrate(weights, &ids, sink_tokens, positions, progress);
    made.map_err(|e| match (texts, e.kind()) {
        (Some(dir), ErrorKind::Usage) => e.within(format!("--texts {}", dir.display())),
        _ => e,
    })
}

/// Generates ids for a model without a tokenizer, which nothing else can be read with either.
fn random_documents(vocab: usize, trained: usize) -> Vec<Vec<u32>> {
    let mut rng = StdRng::seed_from_u64(0);
    let ids: Vec<u32> = (0..TOKENS).map(|_| rng.random_range(0..vocab as u32)).collect();
    ids.chunks(LONGEST.min(trained)).map(<[u32]>::to_vec).collect()
}

/// Reads the text files of a folder, in order of name.
fn documents(dir: &Path) -> Result<Vec<String>> {
    let fail = |e: std::io::Error| Error::io(dir, e);
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(dir).map_err(fail)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().map_err(fail)?;
    paths.retain(|p| p.is_file());
    paths.sort();
    if paths.is_empty() {
        return Err(Error::usage("--texts", format!("{} has no files", dir.display())));
    }
    paths.iter().map(|p| std::fs::read_to_string(p).at(p.display())).collect()
}

/// Returns the cache file of the checkpoint's calibration, or `None` on a system without a cache directory.
fn cache_file(checkpoint: &Checkpoint, sink_tokens: usize) -> Result<Option<PathBuf>> {
    let Some(dir) = dirs::cache_dir() else { return Ok(None) };
    let mut hash = Sha256::new();
    hash.update(format!("calibration 1, {sink_tokens} sinks"));
    bundled().iter().for_each(|text| hash.update(text));
    for path in checkpoint.files() {
        sample(&path, &mut hash).map_err(|e| Error::io(&path, e))?;
    }
    let name: String = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
    Ok(Some(dir.join("bfly").join("recall").join(name + ".safetensors")))
}

/// Hashes a file's length and 256 evenly spaced pieces of 16 KiB, the first and the last among them: reading all of a
/// large checkpoint at every start would take longer than loading it.
fn sample(path: &Path, hash: &mut Sha256) -> std::io::Result<()> {
    const PIECES: u64 = 256;
    const PIECE: u64 = 16 << 10;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    hash.update(length.to_le_bytes());
    let last = length.saturating_sub(PIECE);
    let mut buffer = vec![];
    for i in 0..PIECES {
        file.seek(SeekFrom::Start((u128::from(last) * u128::from(i) / u128::from(PIECES - 1)) as u64))?;
        buffer.clear();
        file.by_ref().take(PIECE).read_to_end(&mut buffer)?;
        hash.update(&buffer);
    }
    Ok(())
}

fn save(path: &Path, calibration: &Calibration) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    }
    Output::reserve(path, "the cache directory")?.write(&calibration.to_bytes()?)
}
