//! Checkpoints by hub id: download, cache, revisions, offline use, and what is said when it fails.
//!
//! A small HTTP server in this file answers the requests that hf-hub makes for a repository of one golden case. Settings go
//! through environment variables, so every case runs the binary in a process of its own with a cache of its own.
use crate::common::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const REPOSITORY: &str = "tiny/qwen2";
/// Branches, as a URL spells them, and the commits they point to.
const BRANCHES: &[(&str, &str)] = &[
    ("main", "0123456789abcdef0123456789abcdef01234567"),
    ("long%2Fcontext", "89abcdef0123456789abcdef0123456789abcdef"),
];
/// Files that real repositories hold beside what is needed.
const UNNEEDED: &[&str] =
    &["README.md", "pytorch_model.bin", "original/consolidated.safetensors", "onnx/config.json", "broken.gguf"];
/// Connections served at once; hf-hub opens at most eight.
const CONNECTIONS: usize = 16;
/// An address that nothing listens on.
const CLOSED: &str = "http://127.0.0.1:1";
/// No run may take longer, whatever the network does.
const LIMIT: Duration = Duration::from_secs(60);

/// A hub with one repository, gone when dropped.
struct Hub {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    requests: Mutex<Vec<String>>,
    stop: AtomicBool,
    open: AtomicUsize,
}

impl Hub {
    fn start() -> Any<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let worker = shared.clone();
        let listener = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if worker.stop.load(Ordering::SeqCst) {
                    break;
                }
                if worker.open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
                    worker.open.fetch_sub(1, Ordering::SeqCst);
                    continue;
                }
                let worker = worker.clone();
                std::thread::spawn(move || {
                    // A client that goes away early is its own affair.
                    let _ = serve(stream, &worker);
                    worker.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Ok(Self { address, shared, listener: Some(listener) })
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests since the last call, such as `GET /tiny/qwen2/resolve/main/config.json`.
    fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().map(|mut r| std::mem::take(&mut *r)).unwrap_or_default()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the listener, which then closes its port.
        let _ = TcpStream::connect(self.address);
        let _ = self.listener.take().map(|l| l.join());
    }
}

/// Answers one request and closes the connection.
fn serve(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new((&stream).take(1 << 16)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|header| !header.is_empty()) {}
    drop(lines);
    let (method, path) = first.rsplit_once(' ').and_then(|(r, _)| r.split_once(' ')).unwrap_or_default();
    if let Ok(mut requests) = shared.requests.lock() {
        requests.push(format!("{method} {path}"));
    }
    let Reply { status, headers, body } = reply(path);
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
    if method == "GET" {
        stream.write_all(&body)?;
    }
    stream.flush()
}

struct Reply {
    status: &'static str,
    headers: String,
    body: Vec<u8>,
}

/// What the hub says: a revision's commit, a commit's files, or a file.
fn reply(path: &str) -> Reply {
    let json = |value: serde_json::Value| Reply {
        status: "200 OK",
        headers: "Content-Type: application/json\r\n".into(),
        body: value.to_string().into_bytes(),
    };
    let missing = || Reply {
        status: "404 Not Found",
        headers: "X-Error-Code: RepoNotFound\r\n".into(),
        body: br#"{"error":"Repository not found"}"#.to_vec(),
    };
    let path = path.split('?').next().unwrap_or_default();
    let under = |place: &str| path.strip_prefix(&format!("{place}/")).map(String::from);
    if let Some(revision) = under(&format!("/api/models/{REPOSITORY}/revision")) {
        let commit = BRANCHES.iter().find(|(branch, _)| *branch == revision);
        return commit.map_or_else(missing, |(_, commit)| json(serde_json::json!({ "sha": commit })));
    }
    if under(&format!("/api/models/{REPOSITORY}/tree")).is_some() {
        let file =
            |path: &str, size: usize| serde_json::json!({"type": "file", "oid": path, "size": size, "path": path});
        let golden = ["config.json", "model.safetensors"].map(|f| file(f, content(f).map_or(0, |c| c.len())));
        let all: Vec<_> = golden.into_iter().chain(UNNEEDED.iter().map(|f| file(f, 10))).collect();
        return json(all.into());
    }
    let Some((revision, file)) = under(&format!("/{REPOSITORY}/resolve"))
        .and_then(|p| p.split_once('/').map(|(r, f)| (r.to_string(), f.to_string())))
    else {
        return missing();
    };
    let commit = BRANCHES.iter().find(|(branch, commit)| *branch == revision || *commit == revision);
    match (commit, content(&file)) {
        (Some((_, commit)), Some(body)) => {
            let size = body.len();
            let headers = format!("X-Repo-Commit: {commit}\r\nETag: \"{file}-{size}\"\r\nX-Linked-Size: {size}\r\n");
            Reply { status: "200 OK", headers, body }
        }
        _ => missing(),
    }
}

fn content(file: &str) -> Option<Vec<u8>> {
    match file {
        "config.json" | "model.safetensors" => std::fs::read(golden_dir("qwen2").join(file)).ok(),
        "broken.gguf" => Some(b"not GGUF".to_vec()),
        part if part.starts_with("q4/model-0000") => {
            std::fs::read(fault_model(&format!("gguf-split/{}", part.trim_start_matches("q4/")))).ok()
        }
        _ => None,
    }
}

/// A machine of its own: an empty cache and a prompt.
struct Machine(tempfile::TempDir);

/// How a run ended.
struct Ended {
    code: Option<i32>,
    stderr: String,
    json: Option<serde_json::Value>,
    took: Duration,
}

impl Machine {
    fn new() -> Any<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("ids.json"), "[5, 6, 7, 8, 9, 10, 11, 12]")?;
        Ok(Self(dir))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Two tokens of `model`, with nothing of this machine's own hub settings.
    fn run(&self, endpoint: &str, model: &str, flags: &[&str], variables: &[(&str, &str)]) -> Any<Ended> {
        let json = self.file("out.json");
        let _ = std::fs::remove_file(&json);
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"));
        for name in std::env::vars().map(|(name, _)| name) {
            let upper = name.to_uppercase();
            if upper.starts_with("HF_") || upper.starts_with("HUGGINGFACE") || upper.ends_with("_PROXY") {
                command.env_remove(name);
            }
        }
        command.env_remove("TRANSFORMERS_OFFLINE").env_remove("RUST_BACKTRACE");
        command.env("HF_ENDPOINT", endpoint).env("HF_HOME", self.file("hf")).env("HOME", self.0.path());
        command.envs(variables.iter().copied()).args(["--model", model, "--ctx", "64", "-n", "2", "--token-ids"]);
        command.arg(self.file("ids.json")).arg("--json").arg(&json).args(flags).timeout(LIMIT);
        let begin = Instant::now();
        let out = command.output()?;
        Ok(Ended {
            code: out.status.code(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
            took: begin.elapsed(),
            json: std::fs::read(&json).ok().map(|bytes| serde_json::from_slice(&bytes)).transpose()?,
        })
    }
}

impl Ended {
    /// The report of a run that must have worked.
    fn report(self) -> Any<serde_json::Value> {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.json.ok_or_else(|| "no report was written".into())
    }

    /// The message of a run that must have failed: one line, exit code 2, no report.
    fn refusal(self) -> String {
        assert_eq!(self.code, Some(2), "{}", self.stderr);
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "{}", self.stderr);
        assert!(self.stderr.starts_with("error: "), "{}", self.stderr);
        assert!(self.json.is_none(), "a failed run wrote a report");
        self.stderr
    }
}

fn files_fetched(requests: &[String]) -> Vec<String> {
    let file = |r: &String| {
        Path::new(r.strip_prefix("GET ")?.split_once("/resolve/")?.1).file_name().map(|f| f.to_os_string())
    };
    let mut files: Vec<_> = requests.iter().filter_map(file).map(|f| f.to_string_lossy().into_owned()).collect();
    files.sort();
    files
}

#[test]
fn a_download_gives_what_the_local_directory_gives_and_then_works_without_the_hub() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    let local = machine.run(CLOSED, &golden_dir("qwen2").to_string_lossy(), &[], &[])?.report()?;

    let first = machine.run(&hub.endpoint(), REPOSITORY, &[], &[])?.report()?;
    assert_eq!(first["model"], serde_json::json!({"source": "hub", "id": REPOSITORY, "revision": BRANCHES[0].1}));
    assert_eq!(first["token_ids"], local["token_ids"]);
    assert_eq!(files_fetched(&hub.requests()), ["config.json", "model.safetensors"], "only what is needed is fetched");

    let second = machine.run(&hub.endpoint(), REPOSITORY, &[], &[])?.report()?;
    assert_eq!(second["token_ids"], local["token_ids"]);
    assert_eq!(files_fetched(&hub.requests()), [""; 0], "what is cached is not fetched again");

    let endpoint = hub.endpoint();
    drop(hub);
    for (flags, variables) in [(&["--offline"][..], &[][..]), (&[], &[("HF_HUB_OFFLINE", "1")])] {
        let later = machine.run(&endpoint, REPOSITORY, flags, variables)?.report()?;
        assert_eq!((&later["model"], &later["token_ids"]), (&first["model"], &local["token_ids"]), "{flags:?}");
    }
    Ok(())
}

#[test]
fn offline_asks_the_hub_nothing() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    machine.run(&hub.endpoint(), REPOSITORY, &[], &[])?.report()?;
    hub.requests();
    machine.run(&hub.endpoint(), REPOSITORY, &["--offline"], &[])?.report()?;
    machine.run(&hub.endpoint(), REPOSITORY, &[], &[("HF_HUB_OFFLINE", "1")])?.report()?;
    assert_eq!(hub.requests(), [""; 0]);
    Ok(())
}

#[test]
fn a_revision_is_asked_for_by_name_and_reported_as_its_commit() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    let (branch, commit) = BRANCHES[1];
    let flags = ["--revision", "long/context"];
    let report = machine.run(&hub.endpoint(), REPOSITORY, &flags, &[])?.report()?;
    assert_eq!(report["model"]["revision"], commit);
    let requests = hub.requests();
    let asked = format!("GET /api/models/{REPOSITORY}/revision/{branch}");
    assert!(requests.contains(&asked), "{requests:?}");
    assert!(!requests.iter().any(|r| r.contains(BRANCHES[0].1) || r.ends_with("/main")), "{requests:?}");

    let again = machine.run(&hub.endpoint(), REPOSITORY, &["--revision", commit], &[])?.report()?;
    assert_eq!(again["model"]["revision"], commit, "a commit is a revision too");

    let offline =
        |revision: &[&str]| machine.run(&hub.endpoint(), REPOSITORY, &[&["--offline"], revision].concat(), &[]);
    assert_eq!(offline(&flags)?.report()?["model"]["revision"], commit);
    let message = offline(&[])?.refusal();
    assert!(message.contains("/main"), "another branch is not cached: {message}");

    let message = machine.run(&hub.endpoint(), REPOSITORY, &["--revision", "nowhere"], &[])?.refusal();
    assert!(message.contains("nowhere") && message.contains(REPOSITORY), "{message}");
    Ok(())
}

#[test]
fn one_file_of_a_repository_is_fetched_alone() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    let message = machine.run(&hub.endpoint(), &format!("{REPOSITORY}/broken.gguf"), &[], &[])?.refusal();
    assert!(message.contains("broken.gguf") && message.contains("not a readable GGUF file"), "{message}");
    assert_eq!(files_fetched(&hub.requests()), ["broken.gguf"]);
    Ok(())
}

#[test]
fn all_parts_of_a_split_file_are_fetched() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    let (first, second) = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf");
    let local = machine.run(CLOSED, &fault_model(&format!("gguf-split/{first}")), &[], &[])?.report()?;
    let report = machine.run(&hub.endpoint(), &format!("{REPOSITORY}/q4/{second}"), &[], &[])?.report()?;
    assert_eq!(report["token_ids"], local["token_ids"]);
    assert_eq!(files_fetched(&hub.requests()), [first, second]);
    Ok(())
}

#[test]
fn an_unreachable_hub_is_reported_soon_with_the_way_to_do_without() -> Any {
    let ended = Machine::new()?.run(CLOSED, REPOSITORY, &[], &[])?;
    assert!(ended.took < Duration::from_secs(20), "took {:?}", ended.took);
    let message = ended.refusal();
    assert!(message.contains(REPOSITORY), "{message}");
    assert!(message.contains("give --model a directory or a .gguf file"), "{message}");
    Ok(())
}

#[test]
fn an_unknown_repository_is_named() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    for model in ["nobody/nothing", "nobody/nothing/model.gguf"] {
        let message = machine.run(&hub.endpoint(), model, &[], &[])?.refusal();
        assert!(message.contains("not found") && message.contains("nobody/nothing"), "{message}");
    }
    Ok(())
}

#[test]
fn offline_with_nothing_cached_says_so() -> Any {
    let machine = Machine::new()?;
    for (flags, variables) in [(&["--offline"][..], &[][..]), (&[], &[("HF_HUB_OFFLINE", "1")])] {
        for model in [REPOSITORY, "tiny/qwen2/model.gguf"] {
            let message = machine.run(CLOSED, model, flags, variables)?.refusal();
            assert!(message.contains(model) && message.contains("cache") && message.contains("offline"), "{message}");
        }
    }
    Ok(())
}

#[test]
fn what_is_no_hub_id_is_refused_without_asking_the_hub() -> Any {
    let (machine, hub) = (Machine::new()?, Hub::start()?);
    for model in ["qwen2", "./tiny/qwen2", "missing.gguf", "a/b/c/d"] {
        let message = machine.run(&hub.endpoint(), model, &[], &[])?.refusal();
        assert!(message.contains(model), "{message}");
    }
    assert_eq!(hub.requests(), [""; 0]);
    Ok(())
}
