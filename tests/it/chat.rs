//! Chat templates render as transformers renders them (scripts/dump_chat.py records what that is).

use crate::common::*;
use bfly::checkpoint::ChatTemplate;
use bfly::generate::render_chat;
use std::collections::BTreeMap;

#[test]
fn templates_render_as_in_transformers() -> Any {
    let recorded = fixture("chat.json")?;
    let tokens: BTreeMap<String, String> = serde_json::from_value(recorded["tokens"].clone())?;
    let cases = recorded["cases"].as_array().ok_or("no cases")?;
    assert!(cases.len() >= 50, "{} cases", cases.len());
    let mut wrong = vec![];
    for case in cases {
        let source = case["template"].as_str().ok_or("no template")?.to_string();
        let template =
            ChatTemplate { source, origin: "chat.json".into(), tokens: tokens.clone().into_iter().collect() };
        let got = render_chat(&template, case["system"].as_str(), case["user"].as_str().ok_or("no text")?);
        let right = match (&got, case["text"].as_str(), case["refused"].as_str()) {
            (Ok(text), Some(want), _) => text == want,
            (Err(e), None, Some(why)) => e.to_string().contains(why),
            _ => false,
        };
        if !right {
            wrong.push(format!("{}\n  got  {got:?}\n  want {} {}", case["template"], case["text"], case["refused"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    Ok(())
}

#[test]
fn an_unknown_tag_is_refused_with_its_line() {
    let template = ChatTemplate { source: "x\n{% generations %}".into(), origin: "a/t.jinja".into(), tokens: vec![] };
    let e = render_chat(&template, None, "hi").expect_err("no such tag").to_string();
    assert!(e.contains("a/t.jinja") && e.contains("generations") && e.contains("line 2"), "{e}");
}
