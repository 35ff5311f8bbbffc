//! `--variants`: the attention methods to compare, with their settings, as one comma-separated list.
//!
//! An example is `stock,retrofit,retrofit:window=1024,layers=0-3,5,keydiff:budget=1k,block=64`. After `retrofit:` or a
//! rule of [`crate::eviction`] with a colon, every item that is not a variant's name belongs to that variant: another
//! `KEY=VALUE`, or another part of a list of layers.
//!
//! The keys of `retrofit:` and `recall:` are the flags of `bfly-retrofit` ([`RetrofitArgs`]), parsed by the same
//! struct, so that every flag is a key. Keys of their own are `kv` (not of `recall`) and, of `recall` alone,
//! `question=exact`.

use super::kv_budget::{self, parse_share};
use crate::cli::{parse_count, RetrofitArgs};
use crate::error::{Error, Result};
use crate::eviction::{self, EvictionPlan, DEFAULT_BUDGET, RULES};
use crate::method::Method;
use crate::mixer::Phase;
use crate::retrofit::{parse_layers, RetrofitPlan, Settings};
use crate::spec::ModelSpec;
use clap::error::{ContextKind, ContextValue, ErrorKind as ClapErrorKind};
use clap::{CommandFactory, Parser};

/// Key that sets the window or the budget from the cache's size, as a share of a dense cache.
const KV: &str = "kv";
/// Key of `recall` that says how the question is read.
const QUESTION: &str = "question";
/// Flag that error messages name.
const FLAG: &str = "--variants";
/// The two-pool cache: window and block summaries.
const RETROFIT: &str = "retrofit";
/// Exact recall.
const RECALL: &str = "recall";

/// One way to run the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Name as given: `stock`, `retrofit`, `retrofit:window=1024`, `snapkv:budget=1024`.
    pub name: String,
    /// Method that the full-attention layers run.
    pub method: Method,
    /// How layers with exact recall read a question after its context: token by token, or exactly as prefill does.
    /// Other layers make no difference.
    pub question: Phase,
}

impl Variant {
    /// Returns the stock model, without a method.
    pub fn stock() -> Self {
        Self::new("stock".into(), Method::Stock)
    }

    /// Returns the variant `name` that runs `method`, whose questions are read token by token.
    pub fn new(name: String, method: Method) -> Self {
        Self { name, method, question: Phase::Decode }
    }
}

/// Refuses variants with `question=exact`.
///
/// # Errors
/// The first such variant; the message is `question` and `why`.
pub fn refuse_exact_questions(variants: &[Variant], why: &str) -> Result<()> {
    match variants.iter().find(|v| v.question == Phase::Prefill) {
        None => Ok(()),
        Some(v) => Err(Error::usage(format!("{FLAG} {}", v.name), format!("`{QUESTION}` {why}"))),
    }
}

/// Returns the settings of the first variant with exact recall, if there is one.
pub fn recalls<'a>(variants: impl IntoIterator<Item = &'a Variant>) -> Option<&'a Settings> {
    variants.into_iter().filter_map(|v| v.method.plan()).find_map(|plan| plan.settings.recalls())
}

/// Settings of a `retrofit:` variant: the flags of `bfly-retrofit` and the seed, each given as `KEY=VALUE`.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct RetrofitKeys {
    /// Layers and settings of the retrofit.
    #[command(flatten)]
    retrofit: RetrofitArgs,
    /// Seed of the random partner rule.
    #[arg(long)]
    seed: Option<u64>,
}

impl RetrofitKeys {
    /// Returns the names of all flags that take a value.
    fn keys() -> Vec<String> {
        let command = Self::command();
        let flags = command.get_arguments().filter(|a| a.get_action().takes_values());
        flags.filter_map(|a| a.get_long()).map(String::from).collect()
    }

    /// Parses `pairs`; error messages begin with `place`, and name the variant's `own` key with the others.
    fn parse_pairs(pairs: &[(String, String)], own: &str, place: &str) -> Result<Self> {
        let keys = Self::keys();
        if let Some((key, _)) = pairs.iter().find(|(key, _)| !keys.contains(key)) {
            let message = format!("`{key}` is not a setting; settings are {}, {own}", keys.join(", "));
            return Err(Error::usage(place, message));
        }
        Self::try_parse_from(pairs.iter().map(|(key, value)| format!("--{key}={value}")))
            .map_err(|e| named(&e).within(place))
    }
}

/// Rewrites an error of clap, which names a flag, to name the key of `KEY=VALUE`.
fn named(e: &clap::Error) -> Error {
    let text = |kind| match e.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(all)) => all.join(", "),
        _ => String::new(),
    };
    let (flag, value, valid) =
        (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue), text(ContextKind::ValidValue));
    let key = flag.trim_start_matches("--").split([' ', '=']).next().unwrap_or_default().to_string();
    let why = match (e.kind(), std::error::Error::source(e)) {
        (ClapErrorKind::ArgumentConflict, _) => "is given twice".into(),
        (_, _) if !valid.is_empty() => format!("`{value}` is not one of {valid}"),
        (_, Some(why)) if why.to_string().contains(&value) => why.to_string(),
        (_, Some(why)) => format!("`{value}`: {why}"),
        (_, None) => e.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").into(),
    };
    Error::usage(key, why)
}

/// Parses the values of one or more `--variants` flags. `retrofit` starts from the plan `base` (a patch's), or from the
/// defaults for `None`. `ctx` is the context of the dense cache that `kv=SHARE` refers to; `None` where contexts vary.
///
/// # Errors
/// An unknown variant or key, a value that does not parse or does not fit the model, or the same variant twice.
pub fn parse(
    lists: &[String],
    base: Option<&RetrofitPlan>,
    spec: &ModelSpec,
    ctx: Option<usize>,
) -> Result<Vec<Variant>> {
    let mut names: Vec<String> = vec![];
    for list in lists {
        let mut open = false;
        for item in list.split(',').map(str::trim) {
            match names.last_mut() {
                _ if item == "stock" || has_settings(item.split(':').next().unwrap_or_default()) => {
                    open = item.contains(':');
                    names.push(item.into());
                }
                Some(last) if open && (item.contains('=') || item.starts_with(|c: char| c.is_ascii_digit())) => {
                    *last += ",";
                    *last += item;
                }
                _ if item.contains('=') => {
                    return Err(Error::usage(
                        FLAG,
                        format!("`{item}` belongs to no `retrofit:`; write retrofit:{item}"),
                    ));
                }
                _ => {
                    let rules: Vec<_> = RULES.iter().map(|r| r.name()).collect();
                    let message = format!(
                        "`{item}` is not stock, retrofit, recall, {}, or one of the latter with :KEY=VALUE,..",
                        rules.join(", ")
                    );
                    return Err(Error::usage(FLAG, message));
                }
            }
        }
    }
    for (i, name) in names.iter().enumerate() {
        if names[..i].contains(name) {
            return Err(Error::usage(FLAG, format!("names `{name}` twice")));
        }
    }
    names.into_iter().map(|name| variant(name, base, spec, ctx)).collect()
}

/// Returns whether the variant called `name` takes `KEY=VALUE` settings.
fn has_settings(name: &str) -> bool {
    name == RETROFIT || name == RECALL || RULES.iter().any(|r| r.name() == name)
}

fn variant(name: String, base: Option<&RetrofitPlan>, spec: &ModelSpec, ctx: Option<usize>) -> Result<Variant> {
    if name == "stock" {
        return Ok(Variant::stock());
    }
    let place = || format!("{FLAG} {name}");
    let (what, given) = name.split_once(':').unwrap_or((&name, ""));
    let mut given = pairs(given);
    let size = if what == RETROFIT { "window" } else { "budget" };
    if what == RECALL && given.iter().any(|(key, _)| key == KV) {
        return Err(Error::usage(place(), format!("`{KV}` sizes a window or a budget; recall has neither to size")));
    }
    let share = share_of(&mut given, size, ctx).map_err(|e| e.within(place()))?;
    let question = question_of(what, &mut given).map_err(|e| e.within(place()))?;
    if what != RETROFIT && what != RECALL {
        let plan = eviction(what, &given).and_then(|plan| match share {
            Some((share, ctx)) => kv_budget::eviction(&plan, spec, ctx, share),
            None => Ok(plan),
        });
        let plan = plan.map_err(|e| e.within(place()))?;
        return Ok(Variant::new(name, Method::Evict(plan)));
    }
    let keys = RetrofitKeys::parse_pairs(&given, if what == RECALL { QUESTION } else { KV }, &place())?;
    let args = keys.retrofit;
    let saved = args.plan.as_deref().map(RetrofitPlan::load).transpose().map_err(|e| e.within(place()))?;
    if let (Some(plan), Some(path)) = (&saved, &args.plan) {
        // The file is at fault here, not the variant's settings.
        plan.check(spec).map_err(|e| e.within(format!("{}: {}", place(), path.display())))?;
    }
    let base = saved.as_ref().or(base);
    let from = base.map_or_else(Settings::default, |p| p.settings.clone());
    // Unless a plan in a file says otherwise, `retrofit` is the two-pool cache and `recall` recalls, each with its own
    // defaults.
    let from = match (what, saved.is_some()) {
        (RECALL, _) if from.recall == 0 => Settings::recalling(),
        (RETROFIT, false) if from.recall > 0 => Settings::default(),
        _ => from,
    };
    let mut settings = args.settings(from);
    settings.seed = keys.seed.unwrap_or(settings.seed);
    let layers = args.layers.as_deref().map(parse_layers).transpose().map_err(|e| e.within(place()))?;
    let layers = layers.unwrap_or_else(|| base.map(|p| p.layers.clone()));
    if share.is_some() {
        // A placeholder that every block size allows; the share sets the window below.
        settings.window = settings.block;
    }
    let plan = RetrofitPlan::new(spec, layers, settings).and_then(|plan| match share {
        Some((share, ctx)) => kv_budget::retrofit(&plan, spec, ctx, share),
        None => Ok(plan),
    });
    let plan = plan.map_err(|e| e.within(place()))?;
    if question == Some(Phase::Prefill) && plan.settings.recall == 0 {
        return Err(Error::usage(place(), format!("`{QUESTION}` makes no difference: recall is 0")));
    }
    Ok(Variant { name, method: Method::Butterfly(plan), question: question.unwrap_or(Phase::Decode) })
}

/// Removes `question=recall|exact` from `given`, the settings of a variant of kind `what`.
fn question_of(what: &str, given: &mut Vec<(String, String)>) -> Result<Option<Phase>> {
    let Some(at) = given.iter().position(|(key, _)| key == QUESTION) else { return Ok(None) };
    let (_, value) = given.remove(at);
    if what != RECALL {
        return Err(Error::usage(QUESTION, format!("is a setting of recall; {what} reads every question in one way")));
    }
    if given.iter().any(|(key, _)| key == QUESTION) {
        return Err(Error::usage(QUESTION, "is given twice"));
    }
    match value.as_str() {
        "recall" => Ok(Some(Phase::Decode)),
        "exact" => Ok(Some(Phase::Prefill)),
        _ => Err(Error::usage(QUESTION, format!("`{value}` is not one of recall, exact"))),
    }
}

/// Removes `kv=SHARE` from `given` and returns the share with its context. The share sets `size`, so `given` must not
/// hold `size` too.
fn share_of(given: &mut Vec<(String, String)>, size: &str, ctx: Option<usize>) -> Result<Option<(f64, usize)>> {
    let Some(at) = given.iter().position(|(key, _)| key == KV) else { return Ok(None) };
    let (_, value) = given.remove(at);
    let share = parse_share(&value).map_err(|why| Error::usage(KV, format!("`{value}` is {why}")))?;
    if given.iter().any(|(key, _)| key == size || key == KV) {
        return Err(Error::usage(KV, format!("sets the {size}: give one of them, once")));
    }
    match ctx {
        Some(ctx) => Ok(Some((share, ctx))),
        None => {
            Err(Error::usage(KV, format!("is a share of one context's cache, and contexts vary here; give the {size}")))
        }
    }
}

/// Builds the plan of the eviction rule `rule` from `given`: the budget and the rule's own settings.
fn eviction(rule: &str, given: &[(String, String)]) -> Result<EvictionPlan> {
    let (mut budget, mut settings) = (DEFAULT_BUDGET, vec![]);
    let known = eviction::find(rule)?.settings();
    for (key, text) in given {
        // `EvictionPlan::new` refuses unknown keys, whatever their value.
        let named = key == "budget" || known.iter().any(|s| s.name == key);
        let value = match parse_count(text) {
            Err(why) if named => return Err(Error::usage(key, why)),
            value => value.unwrap_or_default(),
        };
        match key.as_str() {
            "budget" => budget = value,
            key => settings.push((key, value)),
        }
    }
    EvictionPlan::new(rule, budget, &settings)
}

/// Splits `a=1,b=2,3,4` into `(a, 1)` and `(b, 2,3,4)`.
fn pairs(text: &str) -> Vec<(String, String)> {
    let mut pairs: Vec<(String, String)> = vec![];
    for item in text.split(',').filter(|item| !item.is_empty()) {
        match (item.split_once('='), pairs.last_mut()) {
            (Some((key, value)), _) => pairs.push((key.trim().into(), value.trim().into())),
            (None, Some((_, value))) => {
                *value += ",";
                *value += item;
            }
            (None, None) => pairs.push((item.into(), String::new())),
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::retrofit::{CodeFit, FarPosition, KeyPooling, PrefillKind, RestKind, WindowAlign, DEFAULT_RECALL};
    use clap::Args;

    fn spec() -> ModelSpec {
        Checkpoint::random("tests/fixtures/goldens/qwen2", 0).unwrap().spec
    }

    fn parsed(list: &str) -> Result<Vec<Variant>> {
        parse(&[list.into()], None, &spec(), None)
    }

    #[test]
    fn a_list_holds_variants_settings_and_lists_of_layers() {
        let all =
            parsed("stock,retrofit, retrofit:window=1k,layers=0-1,3,partner=local,retrofit:sink-tokens=0").unwrap();
        let names: Vec<_> = all.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(
            names,
            ["stock", "retrofit", "retrofit:window=1k,layers=0-1,3,partner=local", "retrofit:sink-tokens=0"]
        );
        assert_eq!(all[0].method, Method::Stock);
        let plan = |i: usize| all[i].method.plan().unwrap();
        assert_eq!((&plan(1).settings, plan(1).layers.as_slice()), (&Settings::default(), [0, 1, 2, 3].as_slice()));
        assert_eq!(plan(2).layers, [0, 1, 3]);
        assert_eq!((plan(2).settings.window, plan(2).settings.partner.as_str()), (1024, "local"));
        assert_eq!(plan(3).settings, Settings { sink_tokens: 0, ..Settings::default() });
        let flags = ["stock".to_string(), "retrofit:pool=pre-rope,far-position=clamp".to_string()];
        assert_eq!(parse(&flags, None, &spec(), None).unwrap().len(), 2);
    }

    #[test]
    fn every_flag_of_bfly_retrofit_is_a_key_and_every_setting_has_one() {
        let keys = RetrofitKeys::keys();
        let command = RetrofitArgs::augment_args(clap::Command::new("flags"));
        // --stock is a variant of its own; the seed is a flag of sampling, too.
        let flags = command.get_arguments().filter_map(|a| a.get_long()).filter(|f| *f != "stock");
        assert_eq!(flags.chain(["seed"]).collect::<Vec<_>>(), keys);
        let optional = Settings { shift_unit: Some(1), butterfly_layers: vec![1], ..Settings::default() };
        let fields = serde_json::to_value(optional).unwrap();
        for field in fields.as_object().unwrap().keys().map(|k| k.replace('_', "-")) {
            assert!(keys.contains(&field), "{field} is not one of {keys:?}");
        }
        let list = "retrofit:block=64,window=128,window-align=token,sink-tokens=1,partner=random,partner-count=2,shift-unit=4,\
                    pool=pre-rope,summary-bias=-0.5,far-position=clamp,seed=9,layers=1,3,recall=9,key-code=exact,rest=means,code-fit=text,prefill=butterfly,butterfly-layers=3";
        let plan = parsed(list).unwrap()[0].method.plan().unwrap().clone();
        let want = Settings {
            block: 64,
            window: 128,
            window_align: WindowAlign::Token,
            sink_tokens: 1,
            partner: "random".into(),
            partner_count: 2,
            shift_unit: Some(4),
            pool: KeyPooling::PreRope,
            summary_bias: -0.5,
            far_position: FarPosition::Clamp,
            seed: 9,
            recall: 9,
            key_code: "exact".into(),
            rest: RestKind::Means,
            code_fit: CodeFit::Text,
            prefill: PrefillKind::Butterfly,
            butterfly_layers: vec![3],
        };
        assert_eq!((plan.settings, plan.layers.as_slice()), (want, [1, 3].as_slice()));
    }

    #[test]
    fn a_patch_is_what_retrofit_starts_from() {
        let settings = Settings { window: 256, ..Settings::default() };
        let base = RetrofitPlan::new(&spec(), Some(vec![1]), settings).unwrap();
        let all = parse(&["retrofit,retrofit:sink-tokens=8".into()], Some(&base), &spec(), None).unwrap();
        assert_eq!(all[0].method.plan(), Some(&base));
        let plan = all[1].method.plan().unwrap();
        assert_eq!((plan.layers.as_slice(), plan.settings.window, plan.settings.sink_tokens), ([1].as_slice(), 256, 8));
    }

    #[test]
    fn recall_is_a_variant_and_retrofit_stays_without_it() {
        let recalls = |v: &Variant| v.method.plan().unwrap().settings.recall;
        let all = parsed("recall,recall:recall=512,rest=means,retrofit,retrofit:recall=64").unwrap();
        assert_eq!(all.iter().map(recalls).collect::<Vec<_>>(), [DEFAULT_RECALL, 512, 0, 64]);
        // Means of blocks need a window of whole blocks, which is the default where they are read.
        let list = "recall,recall:rest=means,recall:rest=means,block=32,recall:butterfly-layers=3,recall:prefill=butterfly,block=96";
        let windows = parsed(list).unwrap();
        let windows = windows.iter().map(|v| v.method.plan().unwrap().settings.window);
        assert_eq!(windows.collect::<Vec<_>>(), [64, 128, 64, 128, 96]);
        assert!(parsed("recall:rest=means,window=64").is_err());
        let settings = Settings { recall: 100, ..Settings::default() };
        let base = RetrofitPlan::new(&spec(), None, settings).unwrap();
        let all = parse(&["recall,retrofit".into()], Some(&base), &spec(), None).unwrap();
        assert_eq!(all.iter().map(recalls).collect::<Vec<_>>(), [100, 0]);
    }

    #[test]
    fn recall_reads_questions_token_by_token_unless_exact() {
        let all = parsed("stock,recall,recall:question=recall,recall:question=exact,recall=512").unwrap();
        let questions: Vec<_> = all.iter().map(|v| v.question == Phase::Prefill).collect();
        assert_eq!(questions, [false, false, false, true]);
        assert_eq!(all[3].name, "recall:question=exact,recall=512");
        assert_eq!(all[3].method.plan().unwrap().settings.recall, 512);
        assert_eq!(all[1].method, all[2].method, "the plan is the same");
        refuse_exact_questions(&all[..3], "").unwrap();
        let e = refuse_exact_questions(&all, "is not for this").unwrap_err().to_string();
        assert!(e.contains("--variants recall:question=exact,recall=512: `question` is not for this"), "{e}");
    }

    #[test]
    fn a_plan_is_read_from_its_file_and_changed_by_what_else_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dense-2.json");
        let settings = Settings { window: 256, ..Settings::default() };
        let plan = RetrofitPlan::new(&spec(), Some(vec![1, 3]), settings).unwrap();
        std::fs::write(&path, serde_json::to_vec(&plan).unwrap()).unwrap();
        let all = parsed(&format!("retrofit:sink-tokens=8,plan={}", path.display())).unwrap();
        let got = all[0].method.plan().unwrap();
        assert_eq!((got.layers.as_slice(), got.settings.window), ([1, 3].as_slice(), 256));
        assert_eq!(got.settings.sink_tokens, 8, "in whatever order");
        let other = RetrofitPlan { model_layers: 9, ..plan };
        std::fs::write(&path, serde_json::to_vec(&other).unwrap()).unwrap();
        let e = parsed(&format!("retrofit:plan={}", path.display())).unwrap_err().to_string();
        assert!(
            e.contains("dense-2.json") && e.contains("made for qwen2 with 9 layers; this model is qwen2 with"),
            "{e}"
        );
        let e = parsed("retrofit:plan=nowhere.json").unwrap_err().to_string();
        assert!(e.contains("--variants") && e.contains("nowhere.json"), "{e}");
    }

    #[test]
    fn rules_that_evict_are_variants_with_settings_of_their_own() {
        let all =
            parsed("stock,keydiff:budget=1k,block=64,retrofit,snapkv:budget=512,window=32,kernel=7,snapkv").unwrap();
        let names: Vec<_> = all.iter().map(|v| v.name.as_str()).collect();
        let want =
            ["stock", "keydiff:budget=1k,block=64", "retrofit", "snapkv:budget=512,window=32,kernel=7", "snapkv"];
        assert_eq!(names, want);
        let evicts = |rule, budget, given: &[_]| Method::Evict(EvictionPlan::new(rule, budget, given).unwrap());
        assert_eq!(all[1].method, evicts("keydiff", 1024, &[("block", 64)]));
        assert_eq!(all[3].method, evicts("snapkv", 512, &[("window", 32), ("kernel", 7)]));
        assert_eq!(all[4].method, evicts("snapkv", 1024, &[]));
        assert_eq!(all[0].method, Method::Stock);
        assert!(all.iter().all(|v| v.method.plan().is_some() == (v.name == "retrofit")), "an eviction is no retrofit");
    }

    #[test]
    fn a_share_of_a_dense_cache_sets_the_window_or_the_budget() {
        let at = |list: &str, ctx| parse(&[list.into()], None, &spec(), Some(ctx));
        let list = "retrofit:kv=1/4,block=16,retrofit:kv=0.75,block=16,layers=0-1,snapkv:kv=1/4,window=8,keydiff:block=16,kv=1/4";
        let (small, large) = (at(list, 1024).unwrap(), at(list, 4096).unwrap());
        let window = |v: &Variant| v.method.plan().unwrap().settings.window;
        let budget = |v: &Variant| v.method.eviction().unwrap().budget;
        assert!((128..256).contains(&window(&small[0])), "a quarter, less a block, sinks and summaries");
        assert!(window(&large[0]) > 4 * window(&small[0]));
        assert_eq!(small[1].method.plan().unwrap().layers, [0, 1]);
        assert_eq!((budget(&small[2]), budget(&small[3])), (256, 240));
        for (list, words) in [
            ("retrofit:kv=1/4,window=512", "sets the window: give one of them"),
            ("retrofit:kv=1/4,kv=1/8", "give one of them, once"),
            ("snapkv:kv=1/4,budget=9", "sets the budget"),
            ("retrofit:kv=1/512", "one block of 128 takes"),
            ("snapkv:kv=1/64", "kv: a budget of 65 for each KV head takes"),
        ] {
            let e = at(list, 1024).unwrap_err().to_string();
            assert!(e.contains("--variants") && e.contains(words), "{list}: {e}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (list, words) in [
            ("", "`` is not stock"),
            ("stock,sdpa", "`sdpa` is not stock, retrofit, recall, snapkv, keydiff, or"),
            ("stock,stock", "`stock` twice"),
            ("stock:window=1", "belongs to no `retrofit:`"),
            ("stock,window=1024", "belongs to no `retrofit:`"),
            ("retrofit:windw=1024", "`windw` is not a setting; settings are layers, plan, block, window,"),
            ("retrofit:stock=1", "`stock` is not a setting"),
            ("retrofit:window=x", "retrofit:window=x: window: `x` is not a number of tokens such as"),
            ("retrofit:partner-count=x", "partner-count: `x`: invalid digit"),
            ("retrofit:summary-bias=", "summary-bias: "),
            ("retrofit:seed=-1", "seed: `-1`: invalid digit"),
            ("retrofit:pool=mid-rope", "pool: `mid-rope` is not one of post-rope, pre-rope"),
            ("retrofit:window=128,window=256", "window: is given twice"),
            ("retrofit:window=100", "--window: 100 is not a whole number of blocks"),
            ("retrofit:partner=none", "`none` is not one of causal_shift"),
            ("retrofit:layers=9", "layer 9 is out of range"),
            ("retrofit:layers=x", "neither `all` nor a list"),
            ("retrofit:5", "`5` is not a setting"),
            ("retrofits", "`retrofits` is not stock"),
            ("recall:partner=all", "--partner: is a setting of block summaries"),
            ("recall:question=maybe", "question: `maybe` is not one of recall, exact"),
            ("recall:question=exact,question=exact", "question: is given twice"),
            ("recall:question=exact,recall=0", "`question` makes no difference: recall is 0"),
            ("recall:questions=exact", "`questions` is not a setting; settings are layers,"),
            ("retrofit:question=exact", "question: is a setting of recall; retrofit reads every question in one way"),
            ("snapkv:question=exact", "question: is a setting of recall; snapkv reads"),
            ("recall:butterfly-layers=1-x", "butterfly-layers: `1-x` is not a list of layers such as 3,5-7"),
            ("recall:layers=0-1,butterfly-layers=3", "--butterfly-layers: layer 3 is not swapped; swapped layers: 0-1"),
            ("retrofit:butterfly-layers=1", "--butterfly-layers: makes no difference: recall is 0"),
            ("recall:kv=1/8", "`kv` sizes a window or a budget"),
            ("recall:key-code=pear", "--key-code: `pear` is not one of pair"),
            ("snapkv2:budget=9", "belongs to no"),
            ("keydiff:budget=0", "--variants keydiff:budget=0: budget: 0 is not a number of tokens"),
            ("keydiff:budget=x", "budget: `x` is not a number of tokens such as"),
            ("keydiff:window=64", "keydiff: `window` is not a setting; settings are budget, block"),
            ("keydiff:layers=0-3", "keydiff: `layers` is not a setting"),
            ("snapkv:budget=64", "budget: 64 leaves no token besides the observation window of 64"),
            ("snapkv:kernel=4", "kernel: 4 is even"),
            ("snapkv:1024", "snapkv: `1024` is not a setting; settings are budget, window, kernel"),
            ("retrofit:kv=1/8", "kv: is a share of one context's cache"),
            ("retrofit:kv=x", "kv: `x` is not a share of a dense cache"),
            ("snapkv,snapkv", "`snapkv` twice"),
            ("snapkv,budget=9", "belongs to no"),
        ] {
            let e = parsed(list).unwrap_err().to_string();
            assert!(e.contains("--variants") && e.contains(words), "{list}: {e}");
        }
    }
}
