//! GGUF files, whole or split by llama.cpp's `gguf-split`, read with candle's bounded header reader. [`crate::tensors`]
//! maps tensor names; `gguf_keys` interprets the metadata.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use super::TensorInfo;
use crate::error::{At, Error, ErrorKind, Result};
use crate::storage::Storage;
use candle_core::quantized::gguf_file::{Content, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// An open GGUF file with all its parts.
pub struct Gguf {
    /// Parts in order; the first holds the metadata.
    parts: Vec<Part>,
    /// Tensors by name, each with the index of its part.
    infos: BTreeMap<String, (usize, TensorInfo)>,
}

struct Part {
    path: PathBuf,
    file: Mutex<File>,
    content: Content,
}

/// Unsupported quantisation types by ggml's number (`enum ggml_type`), for error messages.
const TYPE_NAMES: &[(u32, &str)] = &[
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl Gguf {
    /// Reads and checks the header of the file at `path` and, where it is one part of a split file, the headers of all
    /// parts.
    ///
    /// # Errors
    /// A file is truncated or malformed; a part is missing or belongs to another model.
    pub fn open(path: &Path) -> Result<Self> {
        let given = Part::open(path)?;
        let count = given.count("split.count")?.unwrap_or(1);
        let parts = match count {
            0 | 1 => vec![given],
            _ => join(given, count)?,
        };
        let mut infos = BTreeMap::new();
        for (i, part) in parts.iter().enumerate() {
            for info in part.infos()? {
                let name = info.name.clone();
                if infos.insert(name.clone(), (i, info)).is_some() {
                    let message = format!("tensor `{name}` is stored in another part too");
                    return Err(Error::tensor(part.path.display(), message));
                }
            }
        }
        if let Some(total) = parts[0].count("split.tensors.count")?.filter(|total| *total != infos.len() as u64) {
            let message =
                format!("`split.tensors.count` is {total}; the {} parts hold {} tensors", parts.len(), infos.len());
            return Err(Error::tensor(parts[0].path.display(), message));
        }
        Ok(Self { parts, infos })
    }

    /// Returns all metadata keys with their values, sorted by key.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        let mut entries: Vec<_> = self.parts[0].content.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries.into_iter()
    }

    /// Returns the metadata value of `key`.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.parts[0].content.metadata.get(key)
    }

    /// Returns the metadata value of `key` if it is a string.
    pub fn string(&self, key: &str) -> Option<&str> {
        self.metadata(key).and_then(|v| v.to_string().ok()).map(String::as_str)
    }

    /// Returns the path of the file, or of its first part.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// Returns the path as error messages show it.
    pub fn place(&self) -> String {
        self.path().display().to_string()
    }

    /// Returns the paths of all parts.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// Returns the stored tensor called `name` (a GGUF name).
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.get(name).map(|(_, info)| info)
    }

    /// Returns the names of all stored tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.keys().map(String::as_str)
    }

    /// Reads `length` bytes of tensor `name` (a GGUF name), from byte `start` on.
    ///
    /// # Errors
    /// The tensor is missing; the file cannot be read.
    pub fn read_stored(&self, name: &str, start: u64, length: usize) -> Result<Vec<u8>> {
        let missing = || Error::tensor(self.place(), format!("tensor `{name}` is missing"));
        let part = self.infos.get(name).map(|(part, _)| &self.parts[*part]).ok_or_else(missing)?;
        let place = format!("{}: {name}", part.path.display());
        let entry = part.content.tensor_infos.get(name).ok_or_else(missing)?;
        let mut bytes = vec![0; length];
        let mut file = part.file.lock().map_err(|_| Error::format(&place, "an earlier read panicked"))?;
        file.seek(SeekFrom::Start(part.content.tensor_data_offset + entry.offset + start)).at(&place)?;
        file.read_exact(&mut bytes).at(&place)?;
        Ok(bytes)
    }
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let file = File::open(path).at(&place)?;
        refuse_zero_alignment(&place, &file)?;
        let content = Content::read(&mut BufReader::new(&file)).map_err(|e| header_error(&place, &crate::plain(&e)))?;
        Ok(Self { path: path.into(), file: Mutex::new(file), content })
    }

    /// Returns the part's tensors, after checking that each lies within the file.
    fn infos(&self) -> Result<Vec<TensorInfo>> {
        let place = self.path.display();
        let length = std::fs::metadata(&self.path).at(place)?.len();
        let one = |(name, info): (&String, &candle_core::quantized::gguf_file::TensorInfo)| {
            let what = format!("{}: {name}", self.path.display());
            let elements = info.shape.dims().iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let bytes = elements
                .filter(|n| n.is_multiple_of(info.ggml_dtype.block_size()))
                .and_then(|n| (n / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()));
            let end = bytes
                .and_then(|b| self.content.tensor_data_offset.checked_add(info.offset)?.checked_add(b as u64))
                .ok_or_else(|| Error::format(&what, format!("has the impossible shape {:?}", info.shape.dims())))?;
            if end > length {
                let short = end - length;
                let message = format!("truncated: its data ends {short} bytes past the end of the file");
                return Err(Error::format(&what, message));
            }
            let storage = Storage::from_candle(info.ggml_dtype).ok_or_else(|| format!("type {:?}", info.ggml_dtype));
            Ok(TensorInfo { name: name.clone(), shape: info.shape.dims().to_vec(), storage })
        };
        self.content.tensor_infos.iter().map(one).collect()
    }

    /// Returns a whole number from the metadata; `None` if the key is absent.
    fn count(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        // llama.cpp's splitter writes the number of tensors as i32.
        let count = value.to_u64().ok().or_else(|| value.to_i32().ok().and_then(|n| n.try_into().ok()));
        let bad = || Error::format(self.path.display(), format!("`{key}` is not a count"));
        count.map(Some).ok_or_else(bad)
    }
}

/// Opens the other parts of a file split into `count` parts, given one of them; llama.cpp's naming scheme says where
/// they are.
fn join(given: Part, count: u64) -> Result<Vec<Part>> {
    let place = given.path.display().to_string();
    let number = given.count("split.no")?.unwrap_or(0).saturating_add(1);
    let name = given.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let names = match part_names(&name) {
        Some(names) if names.len() as u64 == count && names.get(number as usize - 1) == Some(&name) => names,
        _ => {
            let message = format!(
                "is part {number} of {count}; its name must end in `-{number:05}-of-{count:05}.gguf` to find the other parts"
            );
            return Err(Error::format(place, message));
        }
    };
    let mut given = Some(given);
    let mut parts = vec![];
    for (i, name) in names.iter().enumerate() {
        let path = Path::new(&place).with_file_name(name);
        let part = match given.take_if(|_| i as u64 + 1 == number) {
            Some(part) => part,
            None if !path.exists() => {
                let message =
                    format!("is part {number} of {count}; part {}, `{name}`, is not in the same directory", i + 1);
                return Err(Error::new(ErrorKind::Io, place, message));
            }
            None => Part::open(&path)?,
        };
        let says = (part.count("split.no")?.map(|n| n.saturating_add(1)), part.count("split.count")?);
        if says != (Some(i as u64 + 1), Some(count)) {
            let message = format!("is named as part {} of {count}, but its `split.no` or `split.count` differs", i + 1);
            return Err(Error::format(path.display(), message));
        }
        parts.push(part);
    }
    Ok(parts)
}

/// Returns the names of all parts of a split file, given the name of one, such as `x-00002-of-00003.gguf`.
pub fn part_names(name: &str) -> Option<Vec<String>> {
    let stem = name.strip_suffix(".gguf")?;
    let (stem, count) = stem.rsplit_once("-of-")?;
    let (stem, number) = stem.rsplit_once('-')?;
    let parse = |digits: &str| match digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()) {
        true => digits.parse::<usize>().ok(),
        false => None,
    };
    let (number, count) = (parse(number)?, parse(count)?);
    let all = || (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.gguf")).collect();
    (1..=count).contains(&number).then(all)
}

/// Refuses `general.alignment` of 0: candle 0.11 divides by it unchecked, which would panic.
fn refuse_zero_alignment(place: &str, mut file: &File) -> Result<()> {
    const KEY: &[u8] = b"general.alignment";
    let mut head = vec![];
    file.take(16 << 20).read_to_end(&mut head).at(place)?;
    file.seek(SeekFrom::Start(0)).at(place)?;
    // Checks every occurrence, since a string may contain the key's text too. After the key: a four-byte value type,
    // the value.
    let zero = |rest: &[u8]| rest.len() >= 8 && rest[4..8].iter().all(|b| *b == 0);
    match head.windows(KEY.len()).enumerate().any(|(i, w)| w == KEY && zero(&head[i + KEY.len()..])) {
        true => Err(Error::format(place, "`general.alignment` is 0")),
        false => Ok(()),
    }
}

fn header_error(place: &str, message: &str) -> Error {
    let number = message.split("unknown dtype for tensor ").nth(1).and_then(|n| n.trim().parse::<u32>().ok());
    match number {
        Some(n) => {
            let name = TYPE_NAMES.iter().find(|(k, _)| *k == n).map_or("unknown", |(_, name)| *name);
            let supported = Storage::ALL.map(|s| s.name().to_uppercase()).join(", ");
            Error::unsupported(
                place,
                format!("quantisation type {n} ({name}) is not supported; supported: {supported}"),
            )
        }
        None => Error::format(place, format!("not a readable GGUF file: {message}")),
    }
}

#[cfg(test)]
mod tests {
    use super::part_names;

    #[test]
    fn the_name_of_one_part_gives_the_names_of_all() {
        assert_eq!(
            part_names("a-b-00002-of-00003.gguf").unwrap(),
            ["a-b-00001-of-00003.gguf", "a-b-00002-of-00003.gguf", "a-b-00003-of-00003.gguf"]
        );
        for other in ["a.gguf", "a-2-of-3.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-00001-of-00002"] {
            assert_eq!(part_names(other), None, "{other}");
        }
    }
}
