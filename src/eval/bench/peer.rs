//! Another engine in the same ladder: a process that answers timed runs over a pipe.
//!
//! The protocol is that of integrations/transformers/README.md: one JSON object a line. A peer first says that it is
//! ready and what it is; then each request names a file of token ids and lengths, and the reply is a timed run or a
//! status.

use crate::error::{Error, ErrorKind, Result};
use crate::eval::report::TimedRun;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// What a peer says of itself.
#[derive(Debug, Clone, Deserialize)]
pub struct PeerInfo {
    ready: bool,
    #[serde(default)]
    status: String,
    /// Name of the engine, such as `transformers`.
    #[serde(default)]
    pub engine: String,
    /// What the engine runs, such as `sdpa`.
    #[serde(default)]
    pub variant: String,
    /// Version of the engine.
    pub version: Option<String>,
    /// Element type of its weights.
    pub dtype: Option<String>,
    /// Bytes of its weights.
    pub weights_bytes: Option<u64>,
    /// Device that it runs on.
    pub device: Option<String>,
    /// Seed of random weights.
    pub random_weights: Option<u64>,
}

#[derive(Serialize)]
struct PeerRequest<'a> {
    ids: &'a Path,
    prompt_tokens: usize,
    new_tokens: usize,
    prefill_chunk: usize,
}

#[derive(Deserialize)]
struct PeerReply {
    sample: Option<TimedRun>,
    kv_bytes: Option<u64>,
    status: Option<String>,
}

/// The outcome of a request.
#[derive(Debug)]
pub enum PeerOutcome {
    /// A timed run, and the bytes of its cache.
    Ran(Box<TimedRun>, Option<u64>),
    /// Why there is no timed run: out of memory, say.
    Status(String),
}

/// A peer's process.
pub struct Peer {
    command: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Time that a peer has to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(10);

impl Peer {
    /// Starts `command` in a shell, with this process's stderr.
    ///
    /// # Errors
    /// A shell that cannot be started.
    pub fn start(command: &str) -> Result<Self> {
        let place = format!("--peer {command}");
        let spawned = Command::new("sh").args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|e| Error::new(ErrorKind::Io, &place, format!("cannot be started: {e}")))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(ErrorKind::Io, place, "was started without its pipes"));
        };
        Ok(Self { command: command.into(), child, stdin: Some(stdin), stdout: BufReader::new(stdout) })
    }

    /// Waits until the peer's model is loaded.
    ///
    /// # Errors
    /// A peer that ends, says something else, or says that it cannot run.
    pub fn ready(&mut self) -> Result<PeerInfo> {
        let ready: PeerInfo = self.read("what it is")?;
        if !ready.ready {
            return Err(self.error(format!("is not ready: {}", ready.status)));
        }
        let usual = |name: &str| !name.is_empty() && !name.contains(char::is_control);
        if !usual(&ready.engine) || !usual(&ready.variant) || ready.engine == "bfly" {
            let names = format!("calls itself `{}`, variant `{}`", ready.engine, ready.variant);
            return Err(self.error(format!("{names}; it must name its own engine and what it runs")));
        }
        Ok(ready)
    }

    /// Requests one run on the first `prompt` ids of the file `ids`.
    ///
    /// # Errors
    /// A peer that ends, or a reply that makes no sense.
    pub fn run(&mut self, ids: &Path, prompt: usize, new: usize, chunk: usize) -> Result<PeerOutcome> {
        let ask = PeerRequest { ids, prompt_tokens: prompt, new_tokens: new, prefill_chunk: chunk };
        self.send(&serde_json::to_string(&ask).map_err(|e| self.error(e.to_string()))?)?;
        let reply: PeerReply = self.read("a sample")?;
        match (reply.sample, reply.status) {
            (Some(sample), _) => match nonsense(&sample, new) {
                None => Ok(PeerOutcome::Ran(Box::new(sample), reply.kv_bytes)),
                Some(what) => Err(self.error(format!("answered with a sample whose {what}"))),
            },
            (None, Some(status)) => Ok(PeerOutcome::Status(one_line(&status))),
            (None, None) => Err(self.error("answered with neither a sample nor a status".into())),
        }
    }

    fn send(&mut self, line: &str) -> Result<()> {
        let sent = match &mut self.stdin {
            Some(stdin) => writeln!(stdin, "{line}").and_then(|()| stdin.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        sent.map_err(|_| self.ended("before it was asked"))
    }

    fn read<T: for<'a> Deserialize<'a>>(&mut self, what: &str) -> Result<T> {
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(0) => Err(self.ended(&format!("without saying {what}"))),
            Ok(_) => serde_json::from_str(&line).map_err(|e| {
                let said: String = line.trim().chars().take(80).collect();
                self.error(format!("should have said {what}, not `{said}`: {e}"))
            }),
            Err(e) => Err(self.error(format!("cannot be read: {e}"))),
        }
    }

    fn ended(&mut self, when: &str) -> Error {
        self.stdin = None;
        let status = self.wait().map_or("still running".into(), |status| status.to_string());
        self.error(format!("ended {when} ({status}); what it said of it is above"))
    }

    fn error(&self, message: String) -> Error {
        Error::new(ErrorKind::Backend, format!("--peer {}", self.command), message)
    }

    fn wait(&mut self) -> Option<std::process::ExitStatus> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The end of its input ends it too.
        let _ = self.stdin.take().map(|mut stdin| writeln!(stdin, "{{\"quit\": true}}"));
        if self.wait().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What makes a record no possible outcome of a run with `new` tokens; `None` where it is one.
fn nonsense(s: &TimedRun, new: usize) -> Option<String> {
    let rises = 0.0 <= s.prefill_s && s.prefill_s <= s.ttft_s && s.ttft_s <= s.end_to_end_s && s.end_to_end_s > 0.0;
    if !rises || !s.end_to_end_s.is_finite() {
        return Some(format!("times do not rise: {} {} {} s", s.prefill_s, s.ttft_s, s.end_to_end_s));
    }
    if s.inter_token_s.iter().any(|t| !t.is_finite() || *t < 0.0) || s.fetched_tokens == 0 {
        return Some("times between tokens are not times".into());
    }
    let told = s.inter_token_s.len() * s.fetched_tokens;
    if told + 1 + s.fetched_tokens < new || told > new + s.fetched_tokens {
        return Some(format!("times between tokens are of about {told} tokens, not {}", new - 1));
    }
    None
}

/// The first line of `text`, cut after 400 characters.
pub fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(400).collect()
}
