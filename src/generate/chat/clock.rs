//! `strftime_now`: the local date and time in a format that the template gives.

use chrono::format::{DelayedFormat, Fixed, Item, StrftimeItems};
use chrono::Local;
use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// Formats the local time like Python's `datetime.now().strftime(format)`, which has no time zone: `%z` and `%Z` are
/// empty.
pub fn now(format: &str) -> Result<String, Error> {
    let zoned = |item: &Item| {
        use Fixed::{TimezoneName, TimezoneOffset, TimezoneOffsetColon, TimezoneOffsetZ};
        matches!(item, Item::Fixed(TimezoneName | TimezoneOffset | TimezoneOffsetColon | TimezoneOffsetZ))
    };
    let items: Vec<Item> = StrftimeItems::new(format).filter(|item| !zoned(item)).collect();
    let now = Local::now().naive_local();
    let mut text = String::new();
    let refused = || Error::new(ErrorKind::InvalidOperation, format!("strftime_now: `{format}` is not a date format"));
    write!(text, "{}", DelayedFormat::new(Some(now.date()), Some(now.time()), items.iter())).map_err(|_| refused())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::now;
    use chrono::{Local, NaiveDateTime, TimeDelta};

    #[test]
    fn the_time_is_local() {
        let text = now("%d %b %Y %H:%M:%S").unwrap();
        let parsed = NaiveDateTime::parse_from_str(&text, "%d %b %Y %H:%M:%S").unwrap();
        assert!((Local::now().naive_local() - parsed).abs() < TimeDelta::minutes(1), "{text}");
    }

    #[test]
    fn time_zones_are_empty() {
        assert_eq!(now("a%%b%Z%z").unwrap(), "a%b");
    }

    #[test]
    fn an_invalid_format_is_refused() {
        assert!(now("%Q").unwrap_err().to_string().contains("%Q"));
    }
}
