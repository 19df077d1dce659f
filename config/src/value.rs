//! Values of keys that are told apart.

use toml::de::DeValue;

/// Values that a key of the table tells from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    /// All but false, 0 and what is empty.
    Set,
    /// This one of true and false.
    Is(bool),
    /// This text.
    Text(&'static str),
}

impl Value {
    /// Whether a value is one of these.
    pub(crate) fn covers(self, value: &DeValue<'_>) -> bool {
        match self {
            Self::Set => is_set(value),
            Self::Is(wanted) => value.as_bool() == Some(wanted),
            Self::Text(text) => value.as_str() == Some(text),
        }
    }
}

fn is_set(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::Boolean(value) => *value,
        DeValue::String(text) => !text.trim().is_empty(),
        DeValue::Integer(digits) => {
            digits.as_str().bytes().any(|digit| digit.is_ascii_alphanumeric() && digit != b'0')
        }
        DeValue::Float(digits) => digits.as_str().parse() != Ok(0.0),
        DeValue::Array(values) => values.iter().any(|value| is_set(value.get_ref())),
        DeValue::Table(table) => !table.is_empty(),
        DeValue::Datetime(_) => true,
    }
}
