//! `ruler`: RULER's tasks and the recall tasks, generated natively, answered by every variant and scored.

use super::sample_args::{CellSpec, ImportedSamples, SampleArgs};
use super::tasks::{self, Sample, SampleKey, RECALL, RECALL_TASKS, TASKS};
use crate::cli::{parse_size, print};
use crate::error::{Error, Result};
use crate::eval::report::table::answers_table;
use clap::Args;
use std::path::PathBuf;

/// Name of all of RULER's tasks in `--tasks`.
const ALL: &str = "all";

/// Flags of `ruler`.
#[derive(Debug, Args)]
pub struct RulerArgs {
    /// Tasks by name, comma-separated; all is every task of RULER but qa_1 and qa_2, which are included where --squad
    /// and --hotpot give their files; recall is recall_turns, recall_needles and recall_count, which are not RULER's.
    #[arg(long, value_name = "all|recall|LIST", default_value = "all", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Questions of qa_1, in the format of SQuAD 2.0, such as dev-v2.0.json.
    #[arg(long, value_name = "FILE.json")]
    pub squad: Option<PathBuf>,
    /// Questions of qa_2, in the format of HotpotQA, such as hotpot_dev_distractor_v1.json.
    #[arg(long, value_name = "FILE.json")]
    pub hotpot: Option<PathBuf>,
    /// Read samples instead of generating them, from a file of --export or of RULER's own code.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["samples", "seed", "squad", "hotpot", "ctx", "export"])]
    pub import: Option<PathBuf>,
    /// Length in tokens that the samples of --import were generated for, where the file does not state it, as RULER's
    /// own files do not [default: the tokens of each sample, rounded up to a multiple of 512]
    #[arg(long, value_name = "TOKENS", requires = "import", value_parser = parse_size)]
    pub import_length: Option<usize>,
    /// Generation and prompting of samples.
    #[command(flatten)]
    pub sample: SampleArgs,
}

impl RulerArgs {
    /// Returns the tasks that `--tasks` names.
    ///
    /// # Errors
    /// An unknown name, or one given twice.
    fn tasks(&self) -> Result<Vec<&'static tasks::Task>> {
        let has_file = |name: &str| match name {
            "qa_1" => self.squad.is_some(),
            "qa_2" => self.hotpot.is_some(),
            _ => true,
        };
        let all = || TASKS.iter().map(|t| t.name).filter(|name| has_file(name)).map(String::from);
        let names = self.tasks.iter().flat_map(|name| match name.as_str() {
            ALL => all().collect(),
            _ => vec![name.clone()],
        });
        tasks::named(&names.collect::<Vec<_>>())
    }

    /// Returns whether `--tasks` names `task`, or a group that it is in.
    fn names(&self, task: &str) -> bool {
        self.tasks.iter().any(|name| match name.as_str() {
            ALL => TASKS.iter().any(|t| t.name == task),
            RECALL => RECALL_TASKS.iter().any(|t| t.name == task),
            name => name == task,
        })
    }

    /// Returns those of the imported `samples` whose task `--tasks` names.
    fn only_named(&self, mut samples: Vec<Sample>) -> Result<Vec<Sample>> {
        if self.tasks != [ALL] {
            samples.retain(|s| self.names(&s.task));
        }
        match samples.is_empty() {
            true => Err(Error::usage("--import", format!("has no samples of {}", self.tasks.join(", ")))),
            false => Ok(samples),
        }
    }
}

/// Runs the tasks and prints a table.
///
/// # Errors
/// Invalid flags or files; a variant that cannot be run.
pub fn run(args: &RulerArgs) -> Result<()> {
    let tasks = args.tasks()?;
    let one = match args.tasks.as_slice() {
        [name] => tasks::find(name).ok().map(|task| task.name),
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
