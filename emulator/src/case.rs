//! Case folders: a kernel with its inputs and the outputs it must have.
//!
//! A folder holds `kernel.ptx`, `launch.json` and `.npy` arrays. Parameters are buffers, scalars, null pointers, or structs given as bytes
//! with device addresses written into them.

use crate::config::Config;
use crate::device::{Device, Launch, Shape};
use crate::mem::FILL;
use crate::npy::{Array, case_name, element, width};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// An output compared with what it must be.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Which parameter, as `#3` or `#1+24` inside a struct.
    pub parameter: String,
    /// Elements.
    pub elements: usize,
    /// Elements outside the tolerance.
    pub wrong: usize,
    /// Largest absolute difference.
    pub worst: f64,
    /// Largest difference as a share of its tolerance (0 when all is exact and exactly met, infinite when an exact value is missed).
    pub worst_share: f64,
    /// Index of the element that is furthest outside.
    pub at: usize,
    /// What is there, and what should be.
    pub got_expected: (f64, f64),
}

/// A case after its run.
#[derive(Debug)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// The launch; counters in it.
    pub launch: Launch,
    /// Outputs.
    pub comparisons: Vec<Comparison>,
    /// Findings, as printed.
    pub findings: Vec<String>,
    /// Findings that are errors.
    pub errors: usize,
    /// Time to parse and lower, and to run.
    pub time: (Duration, Duration),
}

impl Outcome {
    /// All outputs are right and no check at level error found anything.
    pub fn passed(&self) -> bool {
        self.errors == 0 && self.comparisons.iter().all(|c| c.wrong == 0)
    }
}

struct Output {
    parameter: String,
    address: u64,
    bytes: u64,
    dtype: String,
    expect: Array,
    tolerance: (f64, f64),
}

/// Runs the case in a folder.
///
/// # Errors
/// The folder cannot be read, is malformed, or its kernel cannot be loaded or launched.
pub fn run(folder: &Path, config: Config) -> Result<Outcome, String> {
    let read = |name: &str| {
        std::fs::read(folder.join(name)).map_err(|e| format!("{}: {e}", folder.join(name).display()))
    };
    let text = read("launch.json")?;
    let json: Value = serde_json::from_slice(&text).map_err(|e| format!("launch.json: {e}"))?;
    let ptx = read(json["ptx"].as_str().unwrap_or("kernel.ptx"))?;
    let ptx = String::from_utf8_lossy(&ptx);
    let entry = json["entry"].as_str().ok_or("launch.json: entry is missing")?;
    let mut config = config;
    if json["target"].as_str().is_some_and(|t| t.starts_with("sm_9")) && config.model.sm < 90 {
        config.model = crate::config::SM_90;
    }
    let mut device = Device::new(config);
    device.reports.print = false;
    let before = Instant::now();
    let module = device.load(&ptx).map_err(|e| e.to_string())?;
    let load_time = before.elapsed();
    let kernel = module.kernels.get(entry).ok_or_else(|| {
        let mut names: Vec<&str> = module.kernels.keys().map(String::as_str).collect();
        names.sort_unstable();
        format!("no kernel {entry}; the file has {}", names.join(", "))
    })?;
    let mut params = vec![0; kernel.param_bytes as usize];
    let mut outputs = Vec::new();
    let list = json["params"].as_array().ok_or("launch.json: params is missing")?;
    if list.len() != kernel.params.len() {
        return Err(format!(
            "launch.json gives {} parameters, {entry} takes {}",
            list.len(),
            kernel.params.len()
        ));
    }
    for (i, (param, spec)) in kernel.params.iter().zip(list).enumerate() {
        let at = |e: String| format!("parameter {i}: {e}");
        let bytes = match spec["kind"].as_str().unwrap_or("") {
            "buffer" => buffer(&mut device, spec, folder, format!("#{i}"), &mut outputs)
                .map_err(at)?
                .to_le_bytes()
                .to_vec(),
            "scalar" => scalar(spec).map_err(at)?,
            "null_pointer" => vec![0; 8],
            "bytes" => structure(&mut device, spec, folder, i, &mut outputs).map_err(at)?,
            other => return Err(at(format!("kind {other:?}"))),
        };
        if bytes.len() as u64 > param.size {
            return Err(at(format!("{} bytes for a parameter of {}", bytes.len(), param.size)));
        }
        params[param.offset as usize..param.offset as usize + bytes.len()].copy_from_slice(&bytes);
    }
    let dynamic_shared = json["dynamic_shared_bytes"].as_u64().unwrap_or(0) as u32;
    let shape = Shape {
        grid: dims(&json["grid"])?,
        block: dims(&json["block"])?,
        dynamic_shared,
        max_dynamic_shared: Some(dynamic_shared.max(49152)),
        cooperative: json["cooperative"].as_bool().unwrap_or(false),
        stream: 0,
    };
    let before = Instant::now();
    let launch = device.launch(kernel, &shape, &params).map_err(|e| e.to_string())?;
    let run_time = before.elapsed();
    let comparisons = outputs.iter().map(|o| compare(&device, o)).collect::<Result<_, String>>()?;
    let reports = device.reports.all();
    Ok(Outcome {
        name: json["name"].as_str().unwrap_or(entry).to_owned(),
        launch,
        comparisons,
        errors: reports.iter().filter(|r| r.level == crate::config::Level::Error).count(),
        findings: reports.iter().map(|r| r.text.clone()).collect(),
        time: (load_time, run_time),
    })
}

fn dims(value: &Value) -> Result<[u32; 3], String> {
    let list = value.as_array().ok_or("launch.json: grid or block is missing")?;
    let mut out = [1; 3];
    for (to, from) in out.iter_mut().zip(list) {
        *to = from
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .ok_or("launch.json: grid or block is not whole numbers")?;
    }
    Ok(out)
}

fn array(folder: &Path, name: &Value) -> Result<Option<Array>, String> {
    let Some(name) = name.as_str() else { return Ok(None) };
    let file = std::fs::read(folder.join(name)).map_err(|e| format!("{name}: {e}"))?;
    Array::parse(&file).map(Some).map_err(|e| format!("{name}: {e}"))
}

fn buffer(
    device: &mut Device,
    spec: &Value,
    folder: &Path,
    parameter: String,
    outputs: &mut Vec<Output>,
) -> Result<u64, String> {
    let dtype = spec["dtype"].as_str().unwrap_or("u8").to_owned();
    let data = array(folder, &spec["data"])?;
    let elements =
        spec["shape"].as_array().map(|s| s.iter().map(|n| n.as_u64().unwrap_or(0)).product::<u64>());
    let bytes = match (spec["bytes"].as_u64(), &data, elements) {
        (Some(bytes), ..) => bytes,
        (None, Some(data), _) => data.bytes.len() as u64,
        (None, None, Some(n)) => n * width(&dtype)? as u64,
        (None, None, None) => return Err("neither bytes nor shape nor data".to_owned()),
    };
    let address = device.allocate(bytes.max(1)).map_err(|e| e.to_string())?;
    if let Some(data) = data {
        if data.bytes.len() as u64 > bytes {
            return Err(format!("{} bytes of data for a buffer of {bytes}", data.bytes.len()));
        }
        device.write(address, &data.bytes).map_err(|e| e.to_string())?;
    } else if spec["init"].as_str() == Some("zeros") {
        device.write(address, &vec![0; bytes as usize]).map_err(|e| e.to_string())?;
    } else if spec["role"].as_str() != Some("out") {
        // Nobody said what is in it: the same bytes as a fresh buffer, but meant.
        device.write(address, &vec![FILL; bytes as usize]).map_err(|e| e.to_string())?;
    }
    if let Some(expect) = array(folder, &spec["expect"])? {
        let tolerance = (spec["atol"].as_f64().unwrap_or(0.0), spec["rtol"].as_f64().unwrap_or(0.0));
        outputs.push(Output { parameter, address, bytes, dtype, expect, tolerance });
    }
    Ok(address)
}

fn scalar(spec: &Value) -> Result<Vec<u8>, String> {
    let value = &spec["value"];
    let int = || {
        value
            .as_i64()
            .or_else(|| value.as_u64().map(|v| v as i64))
            .or_else(|| value.as_f64().map(|v| v as i64))
            .ok_or("value is not a number")
    };
    let float = || match value.as_str() {
        Some(text) => text.parse::<f64>().map_err(|_| "value is not a number"),
        None => value.as_f64().ok_or("value is not a number"),
    };
    Ok(match spec["dtype"].as_str().unwrap_or("") {
        "f16" => half::f16::from_f64(float()?).to_le_bytes().to_vec(),
        "bf16" => half::bf16::from_f64(float()?).to_le_bytes().to_vec(),
        "f32" => (float()? as f32).to_le_bytes().to_vec(),
        "f64" => float()?.to_le_bytes().to_vec(),
        "i8" | "u8" => vec![int()? as u8],
        "bool" => vec![u8::from(value.as_bool().unwrap_or(value.as_i64() == Some(1)))],
        "i16" | "u16" => (int()? as u16).to_le_bytes().to_vec(),
        "i32" | "u32" => (int()? as u32).to_le_bytes().to_vec(),
        "i64" | "u64" => int()?.to_le_bytes().to_vec(),
        other => return Err(format!("scalar type {other:?}")),
    })
}

fn structure(
    device: &mut Device,
    spec: &Value,
    folder: &Path,
    i: usize,
    outputs: &mut Vec<Output>,
) -> Result<Vec<u8>, String> {
    let hex = spec["hex"].as_str().unwrap_or("");
    let digit =
        |b: u8| char::from(b).to_digit(16).map(|d| d as u8).ok_or("hex has something that is not a digit");
    let mut bytes = hex
        .as_bytes()
        .chunks(2)
        .map(|p| Ok(digit(p[0])? << 4 | digit(*p.get(1).unwrap_or(&b'0'))?))
        .collect::<Result<Vec<u8>, &str>>()?;
    let size = spec["size"].as_u64().unwrap_or(bytes.len() as u64);
    if size > 1 << 20 {
        return Err(format!("a struct of {size} bytes"));
    }
    bytes.resize(size as usize, 0);
    for pointer in spec["pointers"].as_array().into_iter().flatten() {
        let offset = pointer["offset"].as_u64().ok_or("a pointer without offset")? as usize;
        let address = buffer(device, pointer, folder, format!("#{i}+{offset}"), outputs)?;
        let place = bytes
            .get_mut(offset..offset.saturating_add(8))
            .ok_or("a pointer behind the end of its struct")?;
        place.copy_from_slice(&address.to_le_bytes());
    }
    Ok(bytes)
}

fn compare(device: &Device, o: &Output) -> Result<Comparison, String> {
    let index = device.memory.find(o.address, o.bytes.max(1)).ok_or("an output buffer is gone")?;
    let got = device.memory.get(index).bytes();
    let expect_type =
        if o.dtype == "bf16" && o.expect.dtype == "u2" { "bf16" } else { case_name(&o.expect.dtype) };
    let elements = o.expect.bytes.len() / width(expect_type)?;
    if elements * width(&o.dtype)? > got.len() {
        return Err(format!("output {}: {elements} elements expected, the buffer is smaller", o.parameter));
    }
    let (atol, rtol) = o.tolerance;
    let mut c = Comparison {
        parameter: o.parameter.clone(),
        elements,
        wrong: 0,
        worst: 0.0,
        worst_share: 0.0,
        at: 0,
        got_expected: (0.0, 0.0),
    };
    for i in 0..elements {
        let (g, e) = (element(&o.dtype, got, i)?, element(expect_type, &o.expect.bytes, i)?);
        let tolerance = atol + rtol * e.abs();
        let difference = if g == e { 0.0 } else { (g - e).abs() };
        // Written so that NaN is wrong.
        let right = difference <= tolerance;
        let share = match (right, tolerance > 0.0) {
            (_, true) if difference.is_finite() => difference / tolerance,
            (true, _) => 0.0,
            _ => f64::INFINITY,
        };
        c.wrong += usize::from(!right);
        c.worst = if difference.is_nan() { f64::INFINITY } else { c.worst.max(difference) };
        if share > c.worst_share {
            (c.worst_share, c.at, c.got_expected) = (share, i, (g, e));
        }
    }
    Ok(c)
}
