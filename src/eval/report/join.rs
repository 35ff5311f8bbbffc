//! Joining the answers files of several processes into one.
//!
//! The files must agree in model, weight format, build, device and prompt settings, and no cell may be in two of them.
//! The joined cells are sorted by length, then by task and variant in order of first occurrence.

use super::answers::{Answers, JoinedPart};
use crate::cli::short_count;
use crate::error::{Error, Result};
use std::path::Path;

/// Joins `files`; the paths are for error messages.
///
/// # Errors
/// No files, or files that differ in model, build, device or prompt settings or share a cell; the message names both
/// files and the difference.
pub fn join(files: Vec<(&Path, Answers)>) -> Result<Answers> {
    let mut files = files.into_iter();
    let Some((first, mut all)) = files.next() else { return Err(Error::usage("join", "no files")) };
    let part = |a: &Answers| JoinedPart { started: a.header.started.clone(), command: a.header.command.clone() };
    if all.joined.is_empty() {
        all.joined.push(part(&all));
    }
    for (path, other) in files {
        if let Some((what, was, now)) = all.difference(&other) {
            let message = format!("was measured with another {what} than {}: {now}, not {was}", first.display());
            return Err(Error::usage(path.display(), message));
        }
        let parts = if other.joined.is_empty() { vec![part(&other)] } else { other.joined };
        // Parts of one file that was split carry the same entries.
        add_new(&mut all.joined, parts);
        add_new(&mut all.header.resumed, other.header.resumed);
        for cell in other.cells {
            let mut same =
                all.cells.iter().filter(|c| (&c.record.variant, c.length) == (&cell.record.variant, cell.length));
            let what = || format!("{} at {}", cell.record.variant, short_count(cell.length));
            if same.clone().any(|c| c.task == cell.task) {
                let message = format!("has {} of {}, which an earlier file has too", cell.task, what());
                return Err(Error::usage(path.display(), message));
            }
            if same.any(|c| (&c.record.plan, &c.record.eviction) != (&cell.record.plan, &cell.record.eviction)) {
                return Err(Error::usage(
                    path.display(),
                    format!("ran {} with another plan than an earlier file", what()),
                ));
            }
            all.cells.push(cell);
        }
    }
    all.header.started = all.joined.iter().map(|j| j.started.clone()).min().unwrap_or_default();
    let place = |names: &[String], name: &str| names.iter().position(|n| n == name);
    let (mut tasks, mut variants): (Vec<String>, Vec<String>) = (vec![], vec![]);
    for cell in &all.cells {
        for (names, name) in [(&mut tasks, &cell.task), (&mut variants, &cell.record.variant)] {
            if place(names, name).is_none() {
                names.push(name.clone());
            }
        }
    }
    all.cells.sort_by_key(|c| (c.length, place(&tasks, &c.task), place(&variants, &c.record.variant)));
    Ok(all)
}

fn add_new<T: PartialEq>(all: &mut Vec<T>, more: Vec<T>) {
    for one in more {
        if !all.contains(&one) {
            all.push(one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::report::{read, ANSWERS};

    fn ruler() -> Answers {
        read(Path::new("tests/fixtures/quality/ruler.json"), ANSWERS).unwrap()
    }

    /// The fixture in two parts: the cells of one task, and all others.
    fn parts() -> (Answers, Answers) {
        let (mut one, mut rest) = (ruler(), ruler());
        let task = one.cells[0].task.clone();
        one.cells.retain(|c| c.task == task);
        rest.cells.retain(|c| c.task != task);
        assert!(!one.cells.is_empty() && !rest.cells.is_empty());
        (one, rest)
    }

    fn joined(a: Answers, b: Answers) -> Result<Answers> {
        join(vec![(Path::new("a.json"), a), (Path::new("b.json"), b)])
    }

    #[test]
    fn parts_make_the_whole() -> Result<()> {
        let (one, mut rest) = parts();
        rest.header.started.push_str(", the rest");
        let all = joined(one, rest)?;
        assert_eq!(all.joined.len(), 2);
        let key = |a: &Answers| {
            let mut cells: Vec<_> = a.cells.iter().map(|c| serde_json::to_string(c).unwrap()).collect();
            cells.sort();
            cells
        };
        assert_eq!(key(&all), key(&ruler()), "every cell once");
        assert!(all.cells.is_sorted_by_key(|c| c.length));
        // Splitting the joined file and joining it again lists each process once.
        let cut = |first: bool| {
            let mut part = all.clone();
            part.cells.retain(|c| (c.task == all.cells[0].task) == first);
            part
        };
        assert_eq!(joined(cut(true), cut(false))?.joined, all.joined);
        Ok(())
    }

    #[test]
    fn files_that_cannot_be_joined_are_named() {
        let fails = |change: &dyn Fn(&mut Answers)| {
            let (one, mut rest) = parts();
            change(&mut rest);
            joined(one, rest).unwrap_err().to_string()
        };
        let e = fails(&|a| a.header.git_sha = "0000000".into());
        assert!(e.starts_with("b.json") && e.contains("another build") && e.contains("0000000"), "{e}");
        let e = fails(&|a| a.prompting.question_unseen = !a.prompting.question_unseen);
        assert!(e.contains("another set of prompt settings than a.json"), "{e}");
        let e = fails(&|a| a.cells = parts().0.cells);
        assert!(e.contains("which an earlier file has too"), "{e}");
        let e = joined(parts().0, {
            let mut rest = parts().1;
            let at = rest.cells.iter().position(|c| c.record.plan.is_some()).unwrap();
            rest.cells[at].record.plan = None;
            rest
        });
        assert!(e.unwrap_err().to_string().contains("with another plan than an earlier file"));
    }
}
