//! Scoring of answers: RULER's two rules.
//!
//! Both test whether an expected output occurs anywhere in the answer, ignoring case. A task's score is the mean over
//! its samples, in percent.

use serde::{Deserialize, Serialize};

/// Rule that scores an answer by the expected outputs that it contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringRule {
    /// RULER's `string_match_all`: the share of the outputs that occur.
    All,
    /// RULER's `string_match_part`: 1 where any output occurs, else 0.
    Part,
}

impl ScoringRule {
    /// Returns RULER's name of the rule.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "string_match_all",
            Self::Part => "string_match_part",
        }
    }

    /// Scores one answer, 0 to 1; 0 where no output is expected.
    pub fn score(self, answer: &str, outputs: &[String]) -> f64 {
        let answer = answer.to_lowercase();
        let found = outputs.iter().filter(|o| answer.contains(&o.to_lowercase())).count();
        match self {
            Self::All => found as f64 / outputs.len().max(1) as f64,
            Self::Part => f64::from(u8::from(found > 0)),
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
}
