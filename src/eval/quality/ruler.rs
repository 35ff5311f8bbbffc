//! `ruler`: RULER's tasks, made natively, answered by every variant, and scored by its rules.

use super::sample_args::{CellSpec, ImportedSamples, SampleArgs};
use super::tasks::{self, Sample, SampleKey, TASKS};
use crate::cli::{parse_size, print};
use crate::error::{Error, Result};
use crate::eval::report::table::answers_table;
use clap::Args;
use std::path::PathBuf;

/// The flags of `ruler`.
#[derive(Debug, Args)]
pub struct RulerArgs {
    /// Tasks by name. all: every one that needs no file, and those whose file is given.
    #[arg(long, value_name = "all|LIST", default_value = "all", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Questions for qa_1, in the form of SQuAD 2.0.
    #[arg(long, value_name = "FILE.json")]
    pub squad: Option<PathBuf>,
    /// Questions for qa_2, in the form of HotpotQA.
    #[arg(long, value_name = "FILE.json")]
    pub hotpot: Option<PathBuf>,
    /// Samples to read instead of making them: as --export writes them, or as RULER itself does.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["samples", "seed", "squad", "hotpot", "ctx", "export"])]
    pub import: Option<PathBuf>,
    /// Length that the samples of --import were made for, where the file does not tell it, as RULER's own do not.
    #[arg(long, value_name = "TOKENS", requires = "import", value_parser = parse_size)]
    pub import_length: Option<usize>,
    /// How samples are made and prompted.
    #[command(flatten)]
    pub sample: SampleArgs,
}

impl RulerArgs {
    /// The tasks that `--tasks` names.
    ///
    /// # Errors
    /// An unknown name, or one given twice.
    fn tasks(&self) -> Result<Vec<&'static tasks::Task>> {
        if self.tasks == ["all"] {
            let has_file = |name: &str| match name {
                "qa_1" => self.squad.is_some(),
                "qa_2" => self.hotpot.is_some(),
                _ => true,
            };
            return Ok(TASKS.iter().filter(|t| has_file(t.name)).collect());
        }
        tasks::named(&self.tasks)
    }

    /// Those of `samples`, which were read from a file, whose task `--tasks` names.
    fn only_named(&self, mut samples: Vec<Sample>) -> Result<Vec<Sample>> {
        if self.tasks != ["all"] {
            samples.retain(|s| self.tasks.contains(&s.task));
        }
        match samples.is_empty() {
            true => Err(Error::usage("--import", format!("holds no samples of {}", self.tasks.join(", ")))),
            false => Ok(samples),
        }
    }
}

/// Runs the tasks, and prints a table.
///
/// # Errors
/// Bad flags or files; a variant that cannot be run.
pub fn run(args: &RulerArgs) -> Result<()> {
    let tasks = args.tasks()?;
    let one = match args.tasks.as_slice() {
        [name] if name != "all" => Some(name.as_str()),
        _ => None,
    };
    let missing = tasks::SampleDefaults { task: one, max_new_tokens: None };
    let import = |path: &PathBuf| -> Result<ImportedSamples> {
        let samples = args.only_named(tasks::read(path, missing)?)?;
        Ok(ImportedSamples { path: path.clone(), samples, length: args.import_length })
    };
    let imported = args.import.as_ref().map(import).transpose()?;
    let sources = args.sample.sources(args.squad.as_ref(), args.hotpot.as_ref())?;
    let cells = args.sample.lengths().into_iter().flat_map(|length| tasks.iter().map(move |task| (length, *task)));
    let (sources, seed) = (&sources, args.sample.seed);
    let cells = cells.map(|(length, task)| CellSpec {
        task: task.name.into(),
        length,
        count: args.sample.samples,
        make: Box::new(move |index, count| task.sample(sources, SampleKey { length, seed, index }, count)),
    });
    let cells: Vec<_> = cells.collect();
    if let Some(answers) = args.sample.run(&cells, imported)? {
        print(answers_table(&answers))?;
    }
    Ok(())
}
