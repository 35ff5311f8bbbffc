//! `bfly-transforms bench`: single vectors through learned products, dense matrices and FFTs, one thread.

use crate::cli::{at_least_one, print, Bars, Facts, Output, Stored};
use crate::error::{Error, Result};
use crate::eval::report::table::transforms_table;
use crate::eval::report::{kind_of, machine, now, TransformSpeed, TransformTiming, SCHEMA_VERSION, TRANSFORM_SPEED};
use crate::ops::factored::{Plan, PlanRoom};
use crate::ops::multiply_vector;
use crate::transforms::Product;
use clap::Args;
use num_complex::Complex;
use rand::{rngs::StdRng, Rng, SeedableRng};
use realfft::RealFftPlanner;
use rustfft::FftPlanner;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

/// Flags of `bfly-transforms bench`.
#[derive(Debug, Args)]
pub struct TransformsBenchArgs {
    /// Directory that `learn` wrote, or its factors.safetensors [default: random factors of every kind of product]
    #[arg(long, value_name = "DIR|FILE", conflicts_with = "n")]
    pub factors: Option<PathBuf>,
    /// Sizes: a power of two, or all from one to another.
    #[arg(long, value_name = "N|N..N", default_value = "64..4096", value_parser = parse_sizes)]
    pub n: Sizes,
    /// Rounds; each takes one sample of every method, of at least a millisecond.
    #[arg(long, default_value = "21", value_parser = at_least_one)]
    pub rounds: usize,
    /// Write every sample to FILE; an earlier file of such samples is replaced.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Powers of two, ascending.
#[derive(Debug, Clone)]
pub struct Sizes(Vec<usize>);

impl Sizes {
    pub(super) fn all(&self) -> &[usize] {
        &self.0
    }
}

/// Largest size, whose dense complex matrix takes 2 GiB.
const LARGEST: usize = 1 << 14;

pub(super) fn parse_sizes(text: &str) -> std::result::Result<Sizes, String> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let size = |t: &str| t.parse::<usize>().ok().filter(|n| n.is_power_of_two() && (2..=LARGEST).contains(n));
    match (size(first), size(last)) {
        (Some(first), Some(last)) if first <= last => {
            Ok(Sizes((first.ilog2()..=last.ilog2()).map(|l| 1 << l).collect()))
        }
        _ => Err(format!("sizes are powers of two from 2 to {LARGEST}, such as 1024 or 64..4096")),
    }
}

/// Seconds of a sample, at least.
const SAMPLE: f64 = 1e-3;

/// A product and the vectors that it is timed on.
struct Case {
    name: String,
    stored: Stored,
    complex_input: bool,
}

impl Case {
    fn of(name: &str, facts: Facts, complex_input: bool, rng: &mut StdRng) -> Result<Self> {
        let product = Product::random(facts.shape(), &facts.product, rng)?;
        Ok(Self { name: name.into(), stored: Stored::of(facts, &product), complex_input })
    }
}

/// Times every method on every case and prints a table.
///
/// # Errors
/// A factor file that cannot be read, a `--json` that cannot be written.
pub fn run(args: &TransformsBenchArgs) -> Result<()> {
    let reserve = |path: &PathBuf| {
        let earlier = |json: bool| json && kind_of(path).is_ok_and(|kind| kind == TRANSFORM_SPEED);
        let fault = |json| (!earlier(json)).then(|| format!("only results of kind `{TRANSFORM_SPEED}` are replaced"));
        Output::reserve_replacing(path, "--json", |json| Ok(fault(json)))
    };
    let output = args.json.as_ref().map(reserve).transpose()?;
    let (bars, started, mut rng) = (Bars::new(args.quiet), now(), StdRng::seed_from_u64(0));
    let learned = args.factors.as_ref().map(|path| Stored::read(path, "--factors")).transpose()?;
    let random_factors = learned.is_none();
    let cases = match learned {
        Some(stored) => {
            let name = stored.facts.transform.clone();
            let mut cases =
                vec![Case { name: format!("{name} of real input"), stored: stored.clone(), complex_input: false }];
            if stored.facts.complex_target {
                cases.insert(0, Case { name, stored, complex_input: true });
            }
            cases
        }
        None => {
            let each: Result<Vec<_>> = args.n.0.iter().map(|n| random_cases(*n, &mut rng)).collect();
            each?.into_iter().flatten().collect()
        }
    };
    let mut timings = vec![];
    for (i, case) in cases.iter().enumerate() {
        bars.show("kernel", i as u64, cases.len() as u64);
        timings.extend(time(case, args.rounds, &mut rng)?);
    }
    bars.show("kernel", cases.len() as u64, cases.len() as u64);
    let report = TransformSpeed {
        kind: TRANSFORM_SPEED.into(),
        schema_version: SCHEMA_VERSION,
        git_sha: env!("BFLY_GIT_SHA").into(),
        started,
        command: std::env::args().collect(),
        machine: machine(&candle_core::Device::Cpu),
        threads: 1,
        random_factors,
        timings,
    };
    if let Some(output) = output {
        let mut json = serde_json::to_vec(&report).map_err(|e| Error::format("--json", e))?;
        json.push(b'\n');
        output.write(&json)?;
    }
    print(transforms_table(&report))
}

/// Every kind of product of the table of `docs/learned-transforms.md`.
fn random_cases(n: usize, rng: &mut StdRng) -> Result<Vec<Case>> {
    [
        ("DFT", "BP", true, true, (true, true)),
        ("DFT, untied", "BP", true, false, (true, true)),
        ("DFT of real input", "BP", true, true, (false, true)),
        ("Hartley", "BP", true, true, (false, false)),
        ("Hadamard", "BP", false, true, (false, false)),
        ("DCT, DST", "BPP", true, true, (false, false)),
        ("convolution", "BPBP", true, true, (false, false)),
        ("convolution, untied", "BPBP", true, false, (false, false)),
    ]
    .into_iter()
    .map(|(name, product, complex, tied, (complex_input, complex_target))| {
        let facts = Facts { transform: name.into(), n, product: product.into(), complex, tied, complex_target };
        Case::of(name, facts, complex_input, rng)
    })
    .collect()
}

/// A way to compute a case's product once.
type Method = (String, Box<dyn FnMut() -> Result<()>>);

/// Takes a sample of every method in each round, in turns.
fn time(case: &Case, rounds: usize, rng: &mut StdRng) -> Result<Vec<TransformTiming>> {
    let facts = &case.stored.facts;
    let mut methods = methods(case, rng)?;
    let sample = |method: &mut Method, repeats: usize| -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..repeats {
            method.1()?;
        }
        Ok(begin.elapsed().as_secs_f64() / repeats as f64)
    };
    let mut timings = vec![];
    for method in &mut methods {
        sample(method, 3)?;
        let once = sample(method, 3)?;
        timings.push(TransformTiming {
            n: facts.n,
            case: case.name.clone(),
            product: facts.product.clone(),
            complex: facts.complex,
            tied: facts.tied,
            complex_input: case.complex_input,
            complex_output: facts.complex_target,
            method: method.0.clone(),
            repeats: ((SAMPLE / once).ceil() as usize).clamp(1, 1 << 20),
            samples_s: vec![],
        });
    }
    for _ in 0..rounds {
        for (method, timing) in methods.iter_mut().zip(&mut timings) {
            timing.samples_s.push(sample(method, timing.repeats)?);
        }
    }
    Ok(timings)
}

fn methods(case: &Case, rng: &mut StdRng) -> Result<Vec<Method>> {
    let (n, complex) = (case.stored.facts.n, case.stored.facts.complex_target);
    let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (re, im) = (random(n), case.complex_input.then(|| random(n)));
    let mut methods = vec![plan_method(case.stored.plan()?, re.clone(), im.clone(), complex)];
    let rows = if complex { 2 * n } else { n };
    let stacked: Vec<f32> = re.iter().chain(im.iter().flatten()).copied().collect();
    let matrix = std::rc::Rc::new(random(rows * stacked.len()));
    for by_rows in [true, false] {
        let (matrix, x, mut y) = (matrix.clone(), stacked.clone(), vec![0f32; rows]);
        let product = move || {
            multiply_vector(&matrix, by_rows, black_box(&x), &mut y);
            black_box(&y);
            Ok(())
        };
        methods.push((dense("f32", by_rows), Box::new(product)));
    }
    if let Some(im) = &im {
        let z: Vec<Complex<f32>> = re.iter().zip(im).map(|(re, im)| Complex::new(*re, *im)).collect();
        let matrix: Vec<Complex<f32>> =
            random(2 * n * n).as_chunks().0.iter().map(|[re, im]| Complex::new(*re, *im)).collect();
        let matrix = std::rc::Rc::new(matrix);
        for by_rows in [true, false] {
            let (matrix, x, mut y) = (matrix.clone(), z.clone(), z.clone());
            let product = move || {
                multiply_vector(&matrix, by_rows, black_box(&x), &mut y);
                black_box(&y);
                Ok(())
            };
            methods.push((dense("c32", by_rows), Box::new(product)));
        }
        methods.extend(complex_ffts(z));
    } else if complex {
        methods.push(real_fft(re));
    }
    Ok(methods)
}

fn dense(dtype: &str, by_rows: bool) -> String {
    format!("dense {dtype} by {}", if by_rows { "rows" } else { "columns" })
}

fn plan_method(plan: Plan, re: Vec<f32>, im: Option<Vec<f32>>, complex: bool) -> Method {
    let mut room = PlanRoom::default();
    let (mut to_re, mut to_im) = (vec![0f32; re.len()], complex.then(|| vec![0f32; re.len()]));
    let product = move || {
        plan.apply((black_box(&re), im.as_deref()), (&mut to_re, to_im.as_deref_mut()), &mut room)?;
        black_box((&to_re, &to_im));
        Ok(())
    };
    ("plan".into(), Box::new(product))
}

/// From one place to another, and in place of a copy; one or the other is faster by size.
fn complex_ffts(x: Vec<Complex<f32>>) -> [Method; 2] {
    let fft = FftPlanner::<f32>::new().plan_fft_forward(x.len());
    let zeros = |len: usize| vec![Complex::new(0f32, 0.0); len];
    let (mut y, mut scratch) = (zeros(x.len()), zeros(fft.get_immutable_scratch_len()));
    let (from, transform) = (x.clone(), fft.clone());
    let apart = move || {
        transform.process_immutable_with_scratch(black_box(&from), &mut y, &mut scratch);
        black_box(&y);
        Ok(())
    };
    let (mut y, mut scratch) = (zeros(x.len()), zeros(fft.get_inplace_scratch_len()));
    let in_place = move || {
        y.copy_from_slice(black_box(&x));
        fft.process_with_scratch(&mut y, &mut scratch);
        black_box(&y);
        Ok(())
    };
    [("rustfft".into(), Box::new(apart)), ("rustfft in place".into(), Box::new(in_place))]
}

/// Half the spectrum, which is all of a real vector's; its input is overwritten, and so copied.
fn real_fft(from: Vec<f32>) -> Method {
    let fft = RealFftPlanner::<f32>::new().plan_fft_forward(from.len());
    let (mut x, mut y, mut scratch) = (from.clone(), fft.make_output_vec(), fft.make_scratch_vec());
    let transform = move || {
        x.copy_from_slice(black_box(&from));
        let done = fft.process_with_scratch(&mut x, &mut y, &mut scratch);
        done.map_err(|e| Error::usage("realfft", e))?;
        black_box(&y);
        Ok(())
    };
    ("realfft".into(), Box::new(transform))
}
