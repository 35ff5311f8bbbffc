//! Scoring of answers: RULER's two rules, and one for counts.
//!
//! RULER's test whether an expected output occurs anywhere in the answer, ignoring case. A count is right where it is
//! the first number of the answer, since the digits of a wrong count may contain those of the right one. A task's score
//! is the mean over its samples, in percent.

use serde::{Deserialize, Serialize};

/// Rule that scores an answer by the expected outputs that it contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringRule {
    /// RULER's `string_match_all`: the share of the outputs that occur.
    All,
    /// RULER's `string_match_part`: 1 where any output occurs, else 0.
    Part,
    /// 1 where the first number of the answer is one of the outputs, else 0. Numbers are whole words of digits; in an
    /// answer without digits, the words from `zero` to `twelve` are numbers too.
    Count,
}

/// Numbers from 0 in words.
const NUMBERS: [&str; 13] =
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];

/// Returns the first number of `answer`, which is in lower case, in digits without leading zeros.
fn first_number(answer: &str) -> Option<String> {
    let words = || answer.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    let in_digits = |word: &&str| word.chars().all(|c| c.is_ascii_digit());
    if let Some(digits) = words().find(in_digits) {
        let number = digits.trim_start_matches('0');
        return Some(if number.is_empty() { "0" } else { number }.into());
    }
    words().find_map(|word| NUMBERS.iter().position(|n| *n == word)).map(|n| n.to_string())
}

impl ScoringRule {
    /// Returns the name of the rule, RULER's where it is RULER's.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "string_match_all",
            Self::Part => "string_match_part",
            Self::Count => "first_number_match",
        }
    }

    /// Scores one answer, 0 to 1; 0 where no output is expected.
    pub fn score(self, answer: &str, outputs: &[String]) -> f64 {
        let answer = answer.to_lowercase();
        let found = outputs.iter().filter(|o| answer.contains(&o.to_lowercase())).count();
        match self {
            Self::All => found as f64 / outputs.len().max(1) as f64,
            Self::Part => f64::from(u8::from(found > 0)),
            Self::Count => f64::from(u8::from(first_number(&answer).is_some_and(|n| outputs.contains(&n)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(answer: &str, outputs: &[&str]) -> (f64, f64) {
        let outputs: Vec<String> = outputs.iter().map(|o| o.to_string()).collect();
        (ScoringRule::All.score(answer, &outputs), ScoringRule::Part.score(answer, &outputs))
    }

    #[test]
    fn answers_are_scored_as_ruler_scores_them() {
        assert_eq!(scores("They are 123 and 456.", &["123", "456"]), (1.0, 1.0));
        assert_eq!(scores("123, 12, 45", &["123", "456", "789", "999"]), (0.25, 1.0));
        assert_eq!(scores("ABC defg", &["abc", "DEF"]), (1.0, 1.0), "case does not count, nor what stands around");
        assert_eq!(scores("ÉCOLE", &["école"]), (1.0, 1.0));
        assert_eq!(scores("1 2 3", &["123"]), (0.0, 0.0));
        assert_eq!(scores("", &["x"]), (0.0, 0.0));
        assert_eq!(scores("anything", &[]), (0.0, 0.0));
    }

    #[test]
    fn a_count_is_right_where_it_is_the_first_number() {
        let score = |answer: &str| ScoringRule::Count.score(answer, &["7".into()]);
        for right in [" 7.", "7", " **7** lines, not 17", "seven", " Seven.", "There are 07", "are: one label, 7 lines"]
        {
            assert_eq!(score(right), 1.0, "{right}");
        }
        for wrong in [" 17.", " 70", " 6, or 7", "", "several", "line7", "7th", "six or seven", "-"] {
            assert_eq!(score(wrong), 0.0, "{wrong}");
        }
        assert_eq!(ScoringRule::Count.score("0 lines", &["0".into()]), 1.0);
        assert_eq!(ScoringRule::Count.score("7", &[]), 0.0);
    }
}
