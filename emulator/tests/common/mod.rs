//! Runs PTX on a device of the library, for tests.
#![allow(clippy::format_collect, reason = "tests say it the short way")]
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use cuda::config::Config;
use cuda::device::{Device, Launch, Shape};
use cuda::lower::Module;

/// A kernel argument.
#[derive(Clone, Debug)]
pub enum Arg {
    /// A buffer with contents; read back after the launch.
    Buffer(Vec<u8>),
    /// A buffer of so many undefined bytes; read back after the launch.
    Out(usize),
    U32(u32),
    U64(u64),
    F32(f32),
}

/// A buffer of 32-bit values.
pub fn words(values: &[u32]) -> Arg {
    Arg::Buffer(values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// A buffer of 64-bit values.
pub fn doubles(values: &[u64]) -> Arg {
    Arg::Buffer(values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// A buffer of 16-bit values.
pub fn halves(values: &[u16]) -> Arg {
    Arg::Buffer(values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// What came back.
#[derive(Debug)]
pub struct Ran {
    pub device: Device,
    pub launch: Option<Launch>,
    /// Contents of the buffers, in the order of the arguments that are buffers (undefined bytes are 0xff).
    pub buffers: Vec<Vec<u8>>,
    /// Addresses of the buffers.
    pub addresses: Vec<u64>,
}

impl Ran {
    /// Buffer `i` as 32-bit values.
    pub fn words(&self, i: usize) -> Vec<u32> {
        self.buffers[i].chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// Buffer `i` as 64-bit values.
    pub fn doubles(&self, i: usize) -> Vec<u64> {
        self.buffers[i].chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// Buffer `i` as 16-bit values.
    pub fn halves(&self, i: usize) -> Vec<u16> {
        self.buffers[i].chunks_exact(2).map(|b| u16::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// First lines of all findings.
    pub fn findings(&self) -> Vec<String> {
        self.device.reports.all().iter().map(|r| r.text.lines().next().unwrap_or("").to_owned()).collect()
    }

    /// Nothing was found.
    #[track_caller]
    pub fn silent(self) -> Self {
        let texts: Vec<&str> = self.device.reports.all().iter().map(|r| r.text.as_str()).collect();
        assert!(texts.is_empty(), "findings:\n{}", texts.join("\n"));
        self
    }

    /// Something was found whose first line starts with this word (after `========= `).
    #[track_caller]
    pub fn found(self, word: &str) -> Self {
        let findings = self.findings();
        assert!(
            findings.iter().any(|f| f.trim_start_matches("========= ").starts_with(word)),
            "no {word} in {findings:?}"
        );
        self
    }
}

/// A configuration with settings: `config(&[("EMU_APPROX", "exact")])`.
pub fn config(settings: &[(&str, &str)]) -> Config {
    let mut config = Config::default();
    for (key, value) in settings {
        config.set(key, value).unwrap();
    }
    config
}

/// Loads PTX on a quiet device.
pub fn load(ptx: &str, config: Config) -> (Device, Module) {
    let mut device = Device::new(config);
    device.reports.print = false;
    let module = device.load(ptx).unwrap_or_else(|e| panic!("{e}\n{ptx}"));
    (device, module)
}

/// Loads PTX, launches `entry`, reads all buffers back without complaining about undefined bytes.
pub fn run_with(
    ptx: &str,
    entry: &str,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    args: &[Arg],
    config: Config,
) -> Ran {
    let (mut device, module) = load(ptx, config);
    let kernel = module.kernels[entry].clone();
    let mut params = vec![0; kernel.param_bytes as usize];
    let mut addresses = Vec::new();
    let mut sizes = Vec::new();
    for (param, arg) in kernel.params.iter().zip(args) {
        let bytes = match arg {
            Arg::Buffer(contents) => {
                let address = device.allocate(contents.len() as u64).unwrap();
                device.write(address, contents).unwrap();
                addresses.push(address);
                sizes.push(contents.len());
                address.to_le_bytes().to_vec()
            }
            Arg::Out(size) => {
                let address = device.allocate(*size as u64).unwrap();
                addresses.push(address);
                sizes.push(*size);
                address.to_le_bytes().to_vec()
            }
            Arg::U32(v) => v.to_le_bytes().to_vec(),
            Arg::U64(v) => v.to_le_bytes().to_vec(),
            Arg::F32(v) => v.to_le_bytes().to_vec(),
        };
        params[param.offset as usize..param.offset as usize + bytes.len()].copy_from_slice(&bytes);
    }
    assert_eq!(kernel.params.len(), args.len(), "arguments of {entry}");
    let shape = Shape {
        grid,
        block,
        dynamic_shared,
        max_dynamic_shared: Some(dynamic_shared),
        cooperative: false,
        stream: 0,
    };
    let launch = device.launch(&kernel, &shape, &params).unwrap();
    let buffers = addresses
        .iter()
        .zip(&sizes)
        .map(|(&address, &size)| {
            let index = device.memory.find(address, size as u64).unwrap();
            device.memory.get(index).bytes()[..size].to_vec()
        })
        .collect();
    Ran { device, launch: Some(launch), buffers, addresses }
}

/// [`run_with`] the default configuration, one block.
pub fn run(ptx: &str, entry: &str, threads: u32, args: &[Arg]) -> Ran {
    run_with(ptx, entry, [1, 1, 1], [threads, 1, 1], 0, args, Config::default())
}

/// PTX of a kernel `test` with `buffers` pointer parameters: each thread has `%rd1`, `%rd2`, ... = pointer `i` and `%r0` = its index;
/// `body` declares what else it needs. Elements are addressed by the body itself.
pub fn kernel(buffers: usize, body: &str) -> String {
    let params: Vec<String> = (0..buffers).map(|i| format!("    .param .u64 p{i}")).collect();
    let loads: String = (0..buffers).map(|i| format!("    ld.param.u64 %rd{}, [p{i}];\n", i + 1)).collect();
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry test(\n{}\n)\n{{\n    .reg .pred %p<32>;\n    .reg .b16 %h<64>;\n    .reg .b32 %r<256>;\n    .reg .f32 %f<64>;\n    .reg .b64 %rd<128>;\n    .reg .f64 %fd<64>;\n{loads}    mov.u32 %r0, %tid.x;\n{body}\n    ret;\n}}\n",
        params.join(",\n")
    )
}

/// The number of the line of `ptx` that `text` begins in (the first one).
#[track_caller]
pub fn line_of(ptx: &str, text: &str) -> u32 {
    let at = ptx.find(text).unwrap_or_else(|| panic!("no {text:?} in {ptx}"));
    ptx[..at].matches('\n').count() as u32 + 1
}
