//! `adapter_config.json`: what PEFT writes beside the weights.

use super::error::AdapterError;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::Path;

/// More than any configuration needs; what is over it is not read, and so is not JSON.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Fields that, when set, make PEFT compute something other than `B · A · x · scaling`.
const VARIANTS: [&str; 7] =
    ["use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config"];

/// The part of a LoRA configuration that the operator depends on.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    r: NonZeroUsize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
    /// A list or a regular expression; only shown, since the weights' names say what is there.
    #[serde(default)]
    pub(super) target_modules: Value,
}

impl Config {
    /// Reads and checks a configuration.
    pub(super) fn read(path: &Path) -> Result<Self, AdapterError> {
        let json = |reason: String| AdapterError::Json { path: path.into(), reason };
        let mut text = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_CONFIG_BYTES).read_to_end(&mut text))
            .map_err(|reason| AdapterError::io(path, reason))?;
        let fields: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| json(e.to_string()))?;
        let refuse = |field: &'static str, expected: &'static str, got: &dyn ToString| {
            Err(AdapterError::Config { path: path.into(), field, expected, got: got.to_string() })
        };

        let got = fields.get("peft_type").unwrap_or(&Value::Null);
        if got != "LORA" {
            return refuse("peft_type", "\"LORA\"", got);
        }
        if let Some(got) = fields.get("bias").filter(|&bias| bias != "none") {
            return refuse("bias", "\"none\"", got);
        }
        for field in VARIANTS {
            if let Some(got) = fields.get(field).filter(|&value| truthy(value)) {
                return refuse(field, "false or null", got);
            }
        }
        let config: Config =
            serde_json::from_value(Value::Object(fields)).map_err(|e| json(e.to_string()))?;

        let patterns = [("rank_pattern", &config.rank_pattern), ("alpha_pattern", &config.alpha_pattern)];
        for (field, pattern) in patterns {
            for (key, value) in pattern.iter().flatten() {
                if !key.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
                    return refuse(field, "names of modules, without regular expressions", key);
                }
                let usable = match field {
                    "rank_pattern" => value.as_u64().is_some_and(|rank| rank > 0),
                    _ => value.is_number(),
                };
                if !usable {
                    return refuse(field, "positive ranks, or numbers for alpha", &format!("{key}: {value}"));
                }
            }
        }
        Ok(config)
    }

    /// r of a module.
    pub(super) fn rank(&self, module: &str) -> usize {
        let own = matching(&self.rank_pattern, module).and_then(Value::as_u64);
        own.map_or(self.r.get(), |rank| rank as usize)
    }

    /// What PEFT multiplies `B · A · x` by: alpha / r, or alpha / √r for rank-stabilised LoRA.
    pub(super) fn scaling(&self, module: &str) -> f32 {
        let alpha = matching(&self.alpha_pattern, module).and_then(Value::as_f64).unwrap_or(self.lora_alpha);
        let rank = self.rank(module) as f64;
        (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// PEFT's rule for patterns: the first key, in the file's order, that is the module's name or what
/// follows a dot in it.
fn matching<'a>(pattern: &'a Option<Map<String, Value>>, module: &str) -> Option<&'a Value> {
    let rest = |key: &str| module.strip_suffix(key);
    let matches = |key: &str| rest(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    pattern.iter().flatten().find(|(key, _)| matches(key)).map(|(_, value)| value)
}

/// Python's idea of truth, which is how PEFT reads these fields.
fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(set) => *set,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}
