//! Another engine in the same ladder: a child process that makes timed runs on request, over pipes.
//!
//! The protocol is that of integrations/transformers/README.md: one JSON object per line. A peer first sends a ready
//! message with its name and version; then each request names a file of token ids and lengths, and the reply is a timed
//! run or a status.

use crate::error::{Error, ErrorKind, Result};
use crate::eval::report::TimedRun;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Ready message of a peer: its engine, variant and weights.
#[derive(Debug, Clone, Deserialize)]
pub struct PeerInfo {
    ready: bool,
    #[serde(default)]
    status: String,
    /// Name of the engine, such as `transformers`.
    #[serde(default)]
    pub engine: String,
    /// Name of the engine's configuration, such as `sdpa`.
    #[serde(default)]
    pub variant: String,
    /// Version of the engine.
    pub version: Option<String>,
    /// Element type of its weights.
    pub dtype: Option<String>,
    /// Bytes of its weights.
    pub weights_bytes: Option<u64>,
    /// Device that the engine runs on.
    pub device: Option<String>,
    /// Seed of random weights; `None` for real weights.
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

/// Outcome of a request.
#[derive(Debug)]
pub enum PeerOutcome {
    /// A timed run, and the size of its cache in bytes.
    Ran(Box<TimedRun>, Option<u64>),
    /// The reason for a failed run, such as out of memory.
    Status(String),
}

/// Process of a peer; it is told to quit, then killed, when dropped.
pub struct Peer {
    command: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Time that a peer has to exit before it is killed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

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
            return Err(Error::new(ErrorKind::Io, place, "was started without pipes for stdin and stdout"));
        };
        Ok(Self { command: command.into(), child, stdin: Some(stdin), stdout: BufReader::new(stdout) })
    }

    /// Waits for the ready message, which the peer sends once its model is loaded.
    ///
    /// # Errors
    /// A peer that exits, sends something else, or reports that it cannot run.
    pub fn ready(&mut self) -> Result<PeerInfo> {
        let ready: PeerInfo = self.read("its ready message")?;
        if !ready.ready {
            return Err(self.error(format!("is not ready: {}", ready.status)));
        }
        let usual = |name: &str| !name.is_empty() && !name.contains(char::is_control);
        if !usual(&ready.engine) || !usual(&ready.variant) || ready.engine == "bfly" {
            let names = format!("calls itself `{}`, variant `{}`", ready.engine, ready.variant);
            return Err(self.error(format!("{names}; both names must be set, and the engine must not be `bfly`")));
        }
        Ok(ready)
    }

    /// Requests one run on the first `prompt` ids of the file `ids`.
    ///
    /// # Errors
    /// A peer that exits, or a reply that is malformed or implausible.
    pub fn run(&mut self, ids: &Path, prompt: usize, new: usize, chunk: usize) -> Result<PeerOutcome> {
        let ask = PeerRequest { ids, prompt_tokens: prompt, new_tokens: new, prefill_chunk: chunk };
        self.send(&serde_json::to_string(&ask).map_err(|e| self.error(e.to_string()))?)?;
        let reply: PeerReply = self.read("a reply")?;
        match (reply.sample, reply.status) {
            (Some(sample), _) => match implausible(&sample, new) {
                None => Ok(PeerOutcome::Ran(Box::new(sample), reply.kv_bytes)),
                Some(what) => Err(self.error(format!("returned a sample whose {what}"))),
            },
            (None, Some(status)) => Ok(PeerOutcome::Status(one_line(&status))),
            (None, None) => Err(self.error("returned neither a sample nor a status".into())),
        }
    }

    fn send(&mut self, line: &str) -> Result<()> {
        let sent = match &mut self.stdin {
            Some(stdin) => writeln!(stdin, "{line}").and_then(|()| stdin.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        sent.map_err(|_| self.exited("the request"))
    }

    fn read<T: for<'a> Deserialize<'a>>(&mut self, what: &str) -> Result<T> {
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(0) => Err(self.exited(what)),
            Ok(_) => serde_json::from_str(&line).map_err(|e| {
                let said: String = line.trim().chars().take(80).collect();
                self.error(format!("expected {what}, got `{said}`: {e}"))
            }),
            Err(e) => Err(self.error(format!("cannot be read: {e}"))),
        }
    }

    fn exited(&mut self, before: &str) -> Error {
        self.stdin = None;
        let status = self.wait().map_or("still running".into(), |status| status.to_string());
        self.error(format!("exited before {before} ({status}); see its stderr above"))
    }

    fn error(&self, message: String) -> Error {
        Error::new(ErrorKind::Backend, format!("--peer {}", self.command), message)
    }

    fn wait(&mut self) -> Option<std::process::ExitStatus> {
        let begin = Instant::now();
        while begin.elapsed() < EXIT_TIMEOUT {
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
        // A peer also quits at the end of its stdin.
        let _ = self.stdin.take().map(|mut stdin| writeln!(stdin, "{{\"quit\": true}}"));
        if self.wait().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Returns why `s` cannot be the record of a run with `new` tokens; `None` for a plausible one.
fn implausible(s: &TimedRun, new: usize) -> Option<String> {
    let rises = 0.0 <= s.prefill_s && s.prefill_s <= s.ttft_s && s.ttft_s <= s.end_to_end_s && s.end_to_end_s > 0.0;
    if !rises || !s.end_to_end_s.is_finite() {
        return Some(format!("times do not rise: {} {} {} s", s.prefill_s, s.ttft_s, s.end_to_end_s));
    }
    if s.inter_token_s.iter().any(|t| !t.is_finite() || *t < 0.0) || s.fetched_tokens == 0 {
        return Some("times between tokens are not times".into());
    }
    let told = s.inter_token_s.len() * s.fetched_tokens;
    if told + 1 + s.fetched_tokens < new || told > new + s.fetched_tokens {
        return Some(format!("times between tokens cover about {told} tokens, not {}", new - 1));
    }
    None
}

/// Returns the first line of `text`, cut after 400 characters.
pub fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(400).collect()
}
