//! Settings: from `EMU_*` environment variables and from `emu_set`.

use std::fmt;

/// What a check does when it finds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Not looked for.
    Off,
    /// Reported; the kernel goes on.
    Warn,
    /// Reported, and the launch fails with a sticky error.
    Error,
}

/// The checks of the specification's section 8, by their key in `EMU_CHECKS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(usize)]
pub enum Check {
    /// `bounds`: access outside every live allocation, past shared, local, parameter or constant memory. Never off.
    Bounds,
    /// `align`: address not a multiple of the access size.
    Align,
    /// `uninit`: undefined values that decide something.
    Uninit,
    /// `race`: unordered accesses to shared memory.
    Race,
    /// `intra`: unordered accesses to shared memory by lanes of one warp.
    Intra,
    /// `barrier`: barrier and warp synchronisation errors.
    Barrier,
    /// `global`: unordered accesses of two blocks to one global word.
    Global,
    /// `leak`: allocations alive at the end.
    Leak,
    /// `stream`: operations of two streams without order.
    Stream,
    /// `readonly`: `ld.global.nc` of an address that the launch writes.
    ReadOnly,
    /// `misuse`: integer division by zero, copies never waited for, and the like.
    Misuse,
}

/// Keys of [`Check`] with the default level.
pub const CHECKS: [(&str, Check, Level); 11] = [
    ("bounds", Check::Bounds, Level::Error),
    ("align", Check::Align, Level::Error),
    ("uninit", Check::Uninit, Level::Error),
    ("race", Check::Race, Level::Error),
    ("intra", Check::Intra, Level::Warn),
    ("barrier", Check::Barrier, Level::Error),
    ("global", Check::Global, Level::Warn),
    ("leak", Check::Leak, Level::Warn),
    ("stream", Check::Stream, Level::Error),
    ("readonly", Check::ReadOnly, Level::Warn),
    ("misuse", Check::Misuse, Level::Warn),
];

/// The order in which blocks and warps run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By index.
    Forward,
    /// By falling index.
    Reverse,
    /// Shuffled.
    Random(u64),
}

/// The modelled device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// `75`, `80` or `90`.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Shared memory of one of them in bytes.
    pub shared_per_sm: u32,
    /// Largest shared memory of a block (opt-in).
    pub shared_opt_in: u32,
    /// Clock in Hz.
    pub clock: f64,
    /// Memory bandwidth in bytes a second.
    pub bandwidth: f64,
}

/// `sm_75`: for programs that must refuse a card which is too old for them.
pub const SM_75: Model =
    Model { sm: 75, sms: 40, shared_per_sm: 65_536, shared_opt_in: 65_536, clock: 1.59e9, bandwidth: 320e9 };
/// `sm_80`.
pub const SM_80: Model = Model {
    sm: 80,
    sms: 108,
    shared_per_sm: 167_936,
    shared_opt_in: 166_912,
    clock: 1.41e9,
    bandwidth: 1555e9,
};
/// `sm_90`.
pub const SM_90: Model = Model {
    sm: 90,
    sms: 132,
    shared_per_sm: 233_472,
    shared_opt_in: 232_448,
    clock: 1.70e9,
    bandwidth: 3350e9,
};

/// All settings.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Config {
    /// `EMU_DEVICE`.
    pub model: Model,
    /// `EMU_DRIVER`: the CUDA version of the driver, (12, 4) for 12.4. Newer PTX than it knows is refused.
    pub driver: (u32, u32),
    /// `EMU_CHECKS`, indexed by [`Check`].
    pub checks: [Level; CHECKS.len()],
    /// `EMU_ON_FAULT=abort`.
    pub abort_on_fault: bool,
    /// `EMU_SEED`: pseudo-random slice lengths and warp order.
    pub seed: Option<u64>,
    /// `EMU_ORDER`.
    pub order: Order,
    /// `EMU_APPROX=exact` is false here.
    pub degrade_approximations: bool,
    /// `EMU_MMA=rz8`.
    pub mma_truncates: bool,
    /// `EMU_POOLS`.
    pub pools: bool,
    /// `EMU_REPORT`: file that gets one JSON line a launch.
    pub report: Option<String>,
    /// `EMU_MEM_LIMIT` in bytes.
    pub memory_limit: u64,
    /// `EMU_BUDGET`: warp instructions a launch may take before it is called a runaway.
    pub budget: u64,
    /// `EMU_COUNT=0`: memory counters (sectors, bank conflicts, unique bytes) are not kept.
    pub count: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: SM_80,
            driver: (13, 5),
            checks: CHECKS.map(|(_, _, level)| level),
            abort_on_fault: false,
            seed: None,
            order: Order::Forward,
            degrade_approximations: true,
            mma_truncates: false,
            pools: true,
            report: None,
            memory_limit: 8 << 30,
            budget: 20_000_000_000,
            count: true,
        }
    }
}

/// A setting that does not exist or a value it cannot have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// All keys that [`Config::set`] knows.
pub const KEYS: [&str; 13] = [
    "EMU_DEVICE",
    "EMU_DRIVER",
    "EMU_CHECKS",
    "EMU_ON_FAULT",
    "EMU_SEED",
    "EMU_ORDER",
    "EMU_APPROX",
    "EMU_MMA",
    "EMU_POOLS",
    "EMU_REPORT",
    "EMU_MEM_LIMIT",
    "EMU_BUDGET",
    "EMU_COUNT",
];

impl Config {
    /// The level of a check.
    #[inline(always)]
    pub fn level(&self, check: Check) -> Level {
        self.checks[check as usize]
    }

    /// The defaults with what the environment says; a bad value is an error that names the variable.
    ///
    /// # Errors
    /// A variable has a value it cannot have.
    pub fn from_env() -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for key in KEYS {
            if let Ok(value) = std::env::var(key) {
                config.set(key, &value)?;
            }
        }
        Ok(config)
    }

    /// Sets one key (`EMU_CHECKS`, or `checks`) to a value; an empty value gives the default back.
    ///
    /// # Errors
    /// Unknown key, or a value it cannot have.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let default = Self::default();
        let name = key.trim().to_ascii_uppercase();
        let name = name.strip_prefix("EMU_").unwrap_or(&name);
        let value = value.trim();
        let bad = |expected: &str| ConfigError(format!("EMU_{name}={value:?}: expected {expected}"));
        match name {
            "DEVICE" => {
                self.model = match value {
                    "" | "sm_80" => SM_80,
                    "sm_75" => SM_75,
                    "sm_90" => SM_90,
                    _ => return Err(bad("sm_75, sm_80 or sm_90")),
                };
            }
            "DRIVER" if value.is_empty() => self.driver = default.driver,
            "DRIVER" => {
                let version = value.split_once('.').unwrap_or((value, "0"));
                let numbers = version.0.parse().ok().zip(version.1.parse().ok());
                self.driver = numbers
                    .filter(|(major, minor)| (11..=99).contains(major) && *minor < 100)
                    .ok_or_else(|| bad("a CUDA version from 11.0 on, such as 12.4"))?;
            }
            "CHECKS" if value.is_empty() => self.checks = default.checks,
            "CHECKS" => return self.set_checks(value),
            "ON_FAULT" => {
                self.abort_on_fault = match value {
                    "" | "sticky" => false,
                    "abort" => true,
                    _ => return Err(bad("sticky or abort")),
                };
            }
            "SEED" if value.is_empty() => self.seed = None,
            "SEED" => self.seed = Some(value.parse().map_err(|_| bad("a whole number"))?),
            "ORDER" => {
                self.order = match value.split_once(':') {
                    None if value.is_empty() || value == "forward" => Order::Forward,
                    None if value == "reverse" => Order::Reverse,
                    None if value == "random" => Order::Random(0),
                    Some(("random", seed)) => Order::Random(seed.parse().map_err(|_| bad("random:SEED"))?),
                    _ => return Err(bad("forward, reverse or random:SEED")),
                };
            }
            "APPROX" => {
                self.degrade_approximations = match value {
                    "" | "degraded" => true,
                    "exact" => false,
                    _ => return Err(bad("degraded or exact")),
                };
            }
            "MMA" => {
                self.mma_truncates = match value {
                    "" | "exact" => false,
                    "rz8" => true,
                    _ => return Err(bad("exact or rz8")),
                };
            }
            "POOLS" => self.pools = switch(value, true).ok_or_else(|| bad("0 or 1"))?,
            "COUNT" => self.count = switch(value, true).ok_or_else(|| bad("0 or 1"))?,
            "REPORT" => self.report = (!value.is_empty()).then(|| value.to_owned()),
            "MEM_LIMIT" => {
                self.memory_limit =
                    bytes(value, default.memory_limit).ok_or_else(|| bad("bytes, or 512M, 8G"))?;
            }
            "BUDGET" => {
                self.budget =
                    bytes(value, default.budget).ok_or_else(|| bad("a number of warp instructions"))?;
            }
            _ => return Err(ConfigError(format!("unknown setting {key:?}; known: {}", KEYS.join(", ")))),
        }
        Ok(())
    }

    fn set_checks(&mut self, list: &str) -> Result<(), ConfigError> {
        for item in list.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (key, level) = item.split_once('=').unwrap_or((item, "error"));
            let level = match level.trim() {
                "error" => Level::Error,
                "warn" => Level::Warn,
                "off" => Level::Off,
                other => {
                    return Err(ConfigError(format!(
                        "EMU_CHECKS: {key}={other}: expected error, warn or off"
                    )));
                }
            };
            let key = key.trim();
            let mut known = false;
            for (name, check, _) in CHECKS {
                if name == key || key == "all" {
                    known = true;
                    // An access outside memory cannot be carried out, so this one can not be switched off.
                    self.checks[check as usize] = if check == Check::Bounds { Level::Error } else { level };
                }
            }
            if !known {
                let names: Vec<&str> = CHECKS.iter().map(|(name, ..)| *name).collect();
                return Err(ConfigError(format!(
                    "EMU_CHECKS: unknown check {key:?}; known: {}, all",
                    names.join(", ")
                )));
            }
        }
        Ok(())
    }
}

fn switch(value: &str, default: bool) -> Option<bool> {
    match value {
        "" => Some(default),
        "0" | "off" | "false" => Some(false),
        "1" | "on" | "true" => Some(true),
        _ => None,
    }
}

fn bytes(value: &str, default: u64) -> Option<u64> {
    if value.is_empty() {
        return Some(default);
    }
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' | b'k' => (&value[..value.len() - 1], 10),
        b'M' | b'm' => (&value[..value.len() - 1], 20),
        b'G' | b'g' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}
