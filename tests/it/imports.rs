//! Which parts of the library may import which: the rules of docs/architecture.md, read off the sources.

use std::path::{Path, PathBuf};

/// A rule: the files that it is for, and the paths that they may not name.
struct Rule {
    what: &'static str,
    holds_for: fn(&str) -> bool,
    forbids: fn(&str) -> bool,
}

/// Whether `path` is `module` or lies in it.
fn within(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Whether `path` lies in `crate::eval`, but in none of `parts` of it.
fn beyond(path: &str, parts: &[&str]) -> bool {
    within(path, "crate::eval") && !parts.iter().any(|part| within(path, &format!("crate::eval::{part}")))
}

const FLAGS_AND_FIGURES: [&str; 6] = ["clap", "clap_complete", "ctrlc", "indicatif", "plotters", "signal_hook"];

/// The files of the library that are neither evaluation nor command line.
fn is_core(file: &str) -> bool {
    !["eval/", "cli/", "bin/", "lib.rs"].iter().any(|part| file.starts_with(part))
}

const RULES: [Rule; 7] = [
    Rule {
        what: "the core imports neither eval nor cli",
        holds_for: is_core,
        forbids: |path| within(path, "crate::eval") || within(path, "crate::cli"),
    },
    Rule {
        what: "the core imports no crate of flags, progress, signals or figures",
        holds_for: is_core,
        forbids: |path| FLAGS_AND_FIGURES.iter().any(|name| within(path, name)),
    },
    Rule {
        what: "cli does not import eval",
        holds_for: |file| file.starts_with("cli/"),
        forbids: |path| within(path, "crate::eval"),
    },
    Rule {
        what: "report imports nothing else of eval",
        holds_for: |file| file.starts_with("eval/report/"),
        forbids: |path| beyond(path, &["report"]),
    },
    Rule {
        what: "bench imports neither quality nor plot",
        holds_for: |file| file.starts_with("eval/bench/"),
        forbids: |path| within(path, "crate::eval::quality") || within(path, "crate::eval::plot"),
    },
    Rule {
        what: "quality imports neither bench nor plot",
        holds_for: |file| file.starts_with("eval/quality/"),
        forbids: |path| within(path, "crate::eval::bench") || within(path, "crate::eval::plot"),
    },
    Rule {
        what: "plot imports report alone",
        holds_for: |file| file.starts_with("eval/plot/"),
        forbids: |path| beyond(path, &["report", "plot"]),
    },
];

/// Every Rust file below `dir`.
fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => (),
        }
    }
}

/// The module of a file in `src`: `eval::plot` of `eval/plot/mod.rs`.
fn module(file: &str) -> Vec<String> {
    let parts = file.trim_end_matches(".rs").trim_end_matches("mod").trim_end_matches('/').split('/');
    ["crate"].into_iter().chain(parts).filter(|part| !part.is_empty()).map(String::from).collect()
}

/// `super::x` and `self::x` of `module` as `crate::..::x`.
fn absolute(path: &str, module: &[String]) -> String {
    let (mut at, mut rest) = (module.to_vec(), path);
    let mut relative = false;
    loop {
        rest = match (rest.strip_prefix("super::"), rest.strip_prefix("self::")) {
            (Some(up), _) => {
                at.pop();
                up
            }
            (_, Some(here)) => here,
            _ => break,
        };
        relative = true;
    }
    if relative {
        format!("{}::{rest}", at.join("::"))
    } else {
        path.into()
    }
}

/// All paths in `code`: each `a::b::c`, with every branch of `a::{b, c::{d}}`.
fn paths(code: &str) -> Vec<String> {
    let mut found = vec![];
    let mut prefixes: Vec<String> = vec![];
    let mut path = String::new();
    for c in code.chars().chain([' ']) {
        match c {
            c if c.is_alphanumeric() || c == '_' || c == ':' => path.push(c),
            '{' if path.ends_with("::") => {
                prefixes.push(prefixes.last().cloned().unwrap_or_default() + &std::mem::take(&mut path))
            }
            // A brace of code, not of a path.
            '{' => prefixes.push(String::new()),
            _ => {
                let name = std::mem::take(&mut path);
                let prefix = prefixes.last().cloned().unwrap_or_default();
                if name.contains("::") || !prefix.is_empty() && !name.is_empty() {
                    found.push(prefix + &name);
                }
                if c == '}' {
                    prefixes.pop();
                }
            }
        }
    }
    found
}

/// A file's code without comments, and without what stands behind a feature's `cfg_attr`.
fn code(text: &str) -> String {
    let lines = text.lines().filter(|l| !l.trim_start().starts_with("#[cfg_attr(feature"));
    lines.map(|l| l.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// What breaks a rule: the rule, the file and the path that it names.
fn broken(file: &str, text: &str) -> Vec<String> {
    let (code, module) = (code(text), module(file));
    // The tests at the end of a file are a module in its module.
    let (own, tests) = code.split_once("\nmod tests {").unwrap_or((&code, ""));
    let inner = [module.as_slice(), &["tests".to_string()]].concat();
    let resolve = |code: &str, module: &[String]| paths(code).iter().map(|p| absolute(p, module)).collect::<Vec<_>>();
    let paths = [resolve(own, &module), resolve(tests, &inner)].concat();
    let rules = RULES.iter().filter(|r| (r.holds_for)(file));
    rules
        .flat_map(|r| paths.iter().filter(|p| (r.forbids)(p)).map(|p| format!("{}: src/{file} names {p}", r.what)))
        .collect()
}

#[test]
fn every_import_keeps_the_rules_of_the_architecture() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    sources(&src, &mut files);
    let (mut all, mut ruled) = (vec![], [0; RULES.len()]);
    for path in &files {
        let file = path.strip_prefix(&src).expect("below src").to_string_lossy().replace('\\', "/");
        RULES.iter().zip(&mut ruled).for_each(|(r, n)| *n += usize::from((r.holds_for)(&file)));
        all.extend(broken(&file, &std::fs::read_to_string(path).expect("a source")));
    }
    assert!(ruled.iter().all(|n| *n > 5), "a rule has lost its files: {ruled:?}");
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn a_broken_rule_is_found_in_whatever_form() {
    for (file, text) in [
        ("run.rs", "use crate::cli::Bars;"),
        ("run.rs", "use crate::{error::Result, eval::{report::read, target}};"),
        ("run.rs", "fn f() { crate::cli::run(); }"),
        ("ops/mod.rs", "use super::cli::Bars;"),
        ("ops/gemm.rs", "use super::super::eval::bench;"),
        ("retrofit.rs", "#[derive(clap::ValueEnum)]\nenum A {}"),
        ("cli/args.rs", "use crate::eval::target::Target;"),
        ("eval/report/file.rs", "use super::super::variant::Variant;"),
        ("eval/report/table/mod.rs", "use crate::eval::variant::Variant;"),
        ("eval/bench/engine.rs", "use crate::eval::{report::read, quality::tasks};"),
        ("eval/quality/tasks/hay.rs", "use super::super::super::bench::peak;"),
        ("eval/plot/chart.rs", "use crate::eval::kv_budget::parse_share;"),
        ("eval/plot/quality/grid.rs", "use super::super::super::target::Target;"),
    ] {
        assert!(!broken(file, text).is_empty(), "{file}: {text}");
    }
    for (file, text) in [
        ("run.rs", "// use crate::cli::Bars;\nuse crate::error::Result;"),
        ("retrofit.rs", "#[cfg_attr(feature = \"cli\", derive(clap::ValueEnum))]\nenum A {}"),
        ("eval/report/file.rs", "use super::header::Header;\nuse crate::cli::Output;"),
        ("eval/bench/engine.rs", "use crate::eval::report::{hash, Kv};"),
        ("eval/plot/quality/grid.rs", "use super::super::target::target;\nuse crate::eval::report::Cell;"),
        ("eval/plot/render.rs", "#[cfg(test)]\nmod tests {\n    use super::super::theme::LABEL;\n}"),
        ("eval/quality/mod.rs", "fn f() { if a { b::c() } }"),
    ] {
        assert_eq!(broken(file, text), [] as [String; 0]);
    }
}
