//! `cargo xtask resources`: what every kernel takes of a multiprocessor, by `ptxas -v`; spills and local memory fail it.

use std::{
    env, fmt,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::toolchain::{self, Nvcc};

/// What a multiprocessor holds (CUDA C++ Programming Guide, compute capabilities).
#[derive(Clone, Copy, Debug)]
struct Arch {
    number: u32,
    threads: u32,
    blocks: u32,
    shared_bytes: u32,
}

const ARCHS: [Arch; 3] = [
    Arch { number: 80, threads: 2048, blocks: 32, shared_bytes: 164 * 1024 },
    Arch { number: 90, threads: 2048, blocks: 32, shared_bytes: 228 * 1024 },
    Arch { number: 120, threads: 1536, blocks: 24, shared_bytes: 100 * 1024 },
];

/// Registers of each of a multiprocessor's four partitions; a warp's are handed out in units of 256.
const PARTITION_REGISTERS: u32 = 16 * 1024;
/// Shared memory that the system takes of every block.
const RESERVED_SHARED: u32 = 1024;

/// The most dynamic shared memory a launcher asks for, by the beginning of a kernel's name.
const DYNAMIC_SHARED: &[(&str, u32)] = &[
    ("fv_select_sort", 6 * 16_384),
    ("fv_plan_compose", 4 * 16_384),
    ("fv_drop_high", 4 * 16_384),
    ("fv_grow_high", 4 * 16_384),
    ("fv_attention_resident_f16_13", 79_872),
    ("fv_attention_resident_bf16_13", 79_872),
    ("fv_attention_resident_f16_17", 88_064),
    ("fv_attention_resident_bf16_17", 88_064),
    ("fv_attention_stream_f16_128", 52_224),
    ("fv_attention_stream_bf16_128", 52_224),
    ("fv_attention_stream_f32_128", 76_800),
    ("fv_attention_stream_f32", 60_416),
    // 197 tokens of 64 values.
    ("fv_match_resident", 204 * 68 * 4),
    // Up to 2,880 tokens; beyond, 4 bytes each.
    ("fv_match_tiles", 11_520),
    ("fv_match_criteria", 11_520),
    // 197 tokens.
    ("fv_cluster_plan", 3_948),
    ("fv_cluster_nearest", 944),
    // Groups of 16 channels on 32x32 positions, the largest of the published networks.
    ("fv_frequency_forward", 9_216),
    ("fv_frequency_inverse", 9_216),
    ("fv_frequency_bins", 37_888),
    ("fv_frequency_mma", 81_040),
    ("fv_frequency", 88_976),
    // Tokens of 384 values.
    ("fv_predictor_score_f32", 53_760),
    ("fv_predictor_score", 41_472),
];

/// Kernels that fill less than half of a multiprocessor, and why.
const REASONS: &[(&str, &str)] = &[
    (
        "fv_plan_compose",
        "counted with the shared memory of 16,384 tokens; 197 take 788 bytes, and one warp's ordered pass bounds it anyway",
    ),
    (
        "fv_attention_resident",
        "a query tile's scores live in registers, which is why its softmax is exact and costs no shared memory; a warp has products \
         enough of its own to hide their latency",
    ),
    (
        "fv_attention_stream",
        "64 queries' sums, queries and 64 scores of each in registers, as many as products need to be reused",
    ),
    ("fv_attention_scores", "the keys of a block stay in registers over all queries"),
    (
        "fv_cluster_plan",
        "a block an image: bound by latency, and few images need few blocks; 64 registers spill on sm_120",
    ),
    (
        "fv_cluster_pairs",
        "bound by fused multiply-adds: 32 sums and the next step of eight rows in registers; 128 registers spill",
    ),
    (
        "fv_depthwise",
        "a strip's open sums and the nine weights stay in registers; 64 and 80 of them spill on sm_120 in f16",
    ),
    (
        "fv_frequency_mma",
        "a group's whole spectrum stays in shared memory between the transforms, 66 of 79 KiB at 16 channels on 32x32; sums and \
         halves of all channels of sixteen bins, or of sixteen lines, stay in registers, which leave room for 16 warps",
    ),
    (
        "fv_frequency",
        "a group's whole spectrum stays in shared memory between the transforms, 66 of 87 KiB at 16 channels on 32x32; smaller \
         ones (22 to 50 KiB) leave room for two to four blocks",
    ),
    (
        "fv_performer",
        "64 tokens' values, the features' weights and 64 tokens' features in 35 KiB of shared memory: two blocks on \
         sm_120; the sums spill at 64 registers there; fewer tokens a block would read the weights and the sums more often",
    ),
    (
        "fv_windows_pool",
        "a thread has several patches of a window on their way at once, which is what keeps memory busy; 64 registers spill on sm_120",
    ),
    (
        "fv_predictor_",
        "products: a warp's 32 x 32 sums and the next step of the tokens stay in registers, and the next step of the weights is \
         on its way while one multiplies; spills at 128 registers in f32",
    ),
    (
        "fv_match_",
        "bound by fused multiply-adds: twelve independent sums a lane keep them busy with few warps; 64 registers spill",
    ),
];

/// One kernel on one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Usage {
    kernel: String,
    arch: u32,
    registers: u32,
    static_shared: u32,
    stack: u32,
    spill_stores: u32,
    spill_loads: u32,
}

impl Usage {
    fn spills(&self) -> bool {
        self.stack + self.spill_stores + self.spill_loads > 0
    }
}

/// The word before `unit` as a number.
fn before(line: &str, unit: &str) -> Option<u32> {
    line.split_once(unit)?.0.split_whitespace().next_back()?.parse().ok()
}

/// Reads what `ptxas -v` prints.
fn parse(text: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut names = rest.split('\'');
            let kernel = names.next().unwrap_or_default().to_owned();
            let arch = names.nth(1).and_then(|arch| arch.strip_prefix("sm_")?.parse().ok());
            usages.push(Usage { kernel, arch: arch.unwrap_or_default(), ..Usage::default() });
        }
        let Some(usage) = usages.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            usage.stack = before(line, " bytes stack frame").unwrap_or(u32::MAX);
            usage.spill_stores = before(line, " bytes spill stores").unwrap_or(u32::MAX);
            usage.spill_loads = before(line, " bytes spill loads").unwrap_or(u32::MAX);
        }
        if line.contains("Used ") {
            usage.registers = before(line, " registers").unwrap_or(u32::MAX);
            usage.static_shared = before(line, " bytes smem").unwrap_or(0);
        }
    }
    usages
}

/// Threads of a kernel's largest block, out of its PTX: `.maxntid 128, 1, 1` behind its parameters.
fn largest_blocks(ptx: &str) -> Vec<(String, u32)> {
    let entries = ptx.split(".entry ").skip(1);
    let read = |entry: &str| {
        let name = entry.split(['(', ' ', '\n']).next()?.to_owned();
        let head = entry.split('{').next()?;
        let numbers = head.split_once(".maxntid ")?.1;
        let product =
            |text: &str| text.split(',').map(|n| n.trim().parse::<u32>().ok()).product::<Option<u32>>();
        Some((name, product(numbers.lines().next()?)?))
    };
    entries.filter_map(read).collect()
}

/// How many blocks of a kernel a multiprocessor holds.
fn resident_blocks(arch: Arch, registers: u32, shared_bytes: u32, block: u32) -> u32 {
    let warps = block.div_ceil(32);
    let by_threads = arch.threads / (warps * 32);
    let by_shared = arch.shared_bytes / (shared_bytes + RESERVED_SHARED);
    let of_warp = (registers * 32).next_multiple_of(256);
    let by_registers = (PARTITION_REGISTERS / of_warp.max(1)) * 4 / warps;
    by_threads.min(by_shared).min(by_registers).min(arch.blocks)
}

/// A row of the report.
struct Row {
    file: String,
    usage: Usage,
    block: u32,
    dynamic_shared: u32,
    resident: u32,
    /// Percent of the threads that a multiprocessor holds.
    occupancy: u32,
}

impl Row {
    fn new(file: &str, usage: Usage, block: u32, arch: Arch) -> Self {
        let by_name = |(prefix, bytes): &(&str, u32)| usage.kernel.starts_with(prefix).then_some(*bytes);
        let dynamic_shared = DYNAMIC_SHARED.iter().find_map(by_name).unwrap_or(0);
        let resident = resident_blocks(arch, usage.registers, usage.static_shared + dynamic_shared, block);
        let occupancy = 100 * resident * block / arch.threads;
        Self { file: file.to_owned(), usage, block, dynamic_shared, resident, occupancy }
    }

    /// Why the row fails the task, if it does.
    fn complaint(&self) -> Option<&'static str> {
        if self.usage.spills() {
            return Some("spills or local memory");
        }
        let reason = REASONS.iter().any(|(prefix, _)| self.usage.kernel.starts_with(prefix));
        (self.occupancy < 50 && !reason)
            .then_some("fills less than half of a multiprocessor, and no reason is stated")
    }

    fn json(&self) -> String {
        let Self { file, usage, block, dynamic_shared, resident, occupancy } = self;
        let Usage { kernel, arch, registers, static_shared, stack, spill_stores, spill_loads } = usage;
        format!(
            "{{\"kernel\":\"{kernel}\",\"file\":\"{file}\",\"arch\":\"sm_{arch}\",\"registers\":{registers},\
             \"static_shared\":{static_shared},\"dynamic_shared\":{dynamic_shared},\"stack\":{stack},\
             \"spill_stores\":{spill_stores},\"spill_loads\":{spill_loads},\"block\":{block},\
             \"blocks_per_multiprocessor\":{resident},\"occupancy_percent\":{occupancy}}}"
        )
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usage = &self.usage;
        write!(
            f,
            "{:<34} sm_{:<4} {:>4} {:>8} {:>8} {:>6}/{:<6} {:>5} {:>6} {:>7} {:>8} %",
            usage.kernel,
            usage.arch,
            usage.registers,
            usage.static_shared,
            self.dynamic_shared,
            usage.spill_stores,
            usage.spill_loads,
            usage.stack,
            self.block,
            self.resident,
            self.occupancy
        )
    }
}

const HEADER: &str = "kernel                             arch    regs   static  dynamic   spills st/ld stack  block  \
                      blocks/SM  occupancy";

/// Runs a compiler and gives what it wrote to its two outputs.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{command:?} failed ({})\n{text}", output.status))
    }
}

/// The rows of one file: nvcc makes its PTX, as build.rs does, and ptxas the machine code for each architecture.
fn rows(nvcc: &Nvcc, source: &Path, scratch: &Path) -> Result<Vec<Row>, String> {
    let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let ptx = scratch.join(&name).with_extension("ptx");
    let include = source.with_file_name("include");
    let mut command = Command::new(&nvcc.path);
    command.args(["-ptx", "-std=c++17", "-O3", "-lineinfo", "-arch=compute_80", "-I"]);
    run(command.arg(include).arg("-o").arg(&ptx).arg(source))?;
    let text = fs::read_to_string(&ptx).map_err(|error| format!("{}: {error}", ptx.display()))?;
    let blocks = largest_blocks(&text);
    let mut rows = Vec::new();
    for arch in ARCHS {
        let mut command = Command::new(nvcc.path.with_file_name("ptxas"));
        command.args(["-v", "-O3", "-lineinfo", &format!("-arch=sm_{}", arch.number)]);
        let report = run(command.arg("-o").arg(scratch.join(&name).with_extension("cubin")).arg(&ptx))?;
        for usage in parse(&report) {
            let block = blocks.iter().find(|(kernel, _)| *kernel == usage.kernel).map(|(_, block)| *block);
            let block =
                block.ok_or_else(|| format!("{name}.cu: {} has no __launch_bounds__", usage.kernel))?;
            rows.push(Row::new(&name, usage, block, arch));
        }
    }
    if rows.len() != ARCHS.len() * blocks.len() || blocks.is_empty() {
        return Err(format!(
            "{name}.cu: {} kernels in its PTX, {} reports by ptxas",
            blocks.len(),
            rows.len()
        ));
    }
    Ok(rows)
}

fn sources() -> Result<Vec<PathBuf>, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("kernels");
    let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut sources: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}

/// Prints the table, writes resources.json into the target folder, and says whether every kernel passes.
pub(crate) fn report() -> Result<bool, String> {
    let nvcc = toolchain::nvcc().map_err(|error| error.to_string())?;
    let target = toolchain::target_folder()?;
    let scratch = target.join("resources");
    fs::create_dir_all(&scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;
    let mut all = Vec::new();
    for source in sources()? {
        all.extend(rows(&nvcc, &source, &scratch)?);
    }
    let mut table = format!("{HEADER}\n");
    for row in &all {
        let _ = writeln!(table, "{row}");
    }
    print!("{table}");
    for (prefix, reason) in REASONS {
        println!("{prefix}: {reason}");
    }
    let json = target.join("resources.json");
    let rows: Vec<_> = all.iter().map(Row::json).collect();
    fs::write(&json, format!("[\n{}\n]\n", rows.join(",\n")))
        .map_err(|error| format!("{}: {error}", json.display()))?;
    println!("{} rows in {}", all.len(), json.display());
    let complaints: Vec<_> = all.iter().filter_map(|row| Some((row, row.complaint()?))).collect();
    for (row, complaint) in &complaints {
        eprintln!("xtask: {} on sm_{}: {complaint}", row.usage.kernel, row.usage.arch);
    }
    Ok(complaints.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fv_a' for 'sm_80'
ptxas info    : Function properties for fv_a
    104 bytes stack frame, 112 bytes spill stores, 116 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 104 bytes cumulative stack size, 480 bytes cmem[0]
ptxas info    : Compile time = 383.647 ms
ptxas info    : Compiling entry function 'fv_b' for 'sm_120'
ptxas info    : Function properties for fv_b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 128 bytes smem, 464 bytes cmem[0]
";

    #[test]
    fn the_report_of_ptxas_is_read() {
        let usages = parse(REPORT);
        assert_eq!(usages.len(), 2);
        assert_eq!(
            usages[0],
            Usage {
                kernel: "fv_a".to_owned(),
                arch: 80,
                registers: 64,
                static_shared: 0,
                stack: 104,
                spill_stores: 112,
                spill_loads: 116
            }
        );
        assert!(usages[0].spills() && !usages[1].spills());
        assert_eq!((usages[1].arch, usages[1].registers, usages[1].static_shared), (120, 29, 128));
    }

    #[test]
    fn a_spill_is_complained_about_and_so_is_a_kernel_that_fills_little() {
        let [spills, clean] = <[Usage; 2]>::try_from(parse(REPORT)).unwrap();
        assert_eq!(Row::new("f", spills, 128, ARCHS[0]).complaint(), Some("spills or local memory"));
        assert_eq!(Row::new("f", clean.clone(), 128, ARCHS[2]).complaint(), None);
        let heavy = Usage { registers: 255, ..clean };
        assert!(Row::new("f", heavy.clone(), 128, ARCHS[0]).complaint().unwrap().contains("no reason"));
        let excused = Usage { kernel: "fv_plan_compose".to_owned(), ..heavy };
        assert_eq!(Row::new("f", excused, 128, ARCHS[0]).complaint(), None);
    }

    #[test]
    fn blocks_are_read_from_ptx() {
        let ptx = ".visible .entry fv_a(\n\t.param .align 8 .b8 p[128]\n)\n.maxntid 128, 1, 1\n.minnctapersm 8\n{\nret;\n}\n\
                   .visible .entry fv_b(\n)\n{\n}\n.visible .entry fv_c()\n.maxntid 96\n{\n}";
        assert_eq!(largest_blocks(ptx), [("fv_a".to_owned(), 128), ("fv_c".to_owned(), 96)]);
    }

    /// By hand: 64 registers are 2,048 a warp, 8 warps a partition; 100 KiB of shared memory leave room for one block.
    #[test]
    fn occupancy_is_the_least_of_four_limits() {
        assert_eq!(resident_blocks(ARCHS[0], 64, 0, 128), 8);
        assert_eq!(resident_blocks(ARCHS[0], 65, 0, 128), 7);
        assert_eq!(resident_blocks(ARCHS[0], 32, 0, 32), 32);
        assert_eq!(resident_blocks(ARCHS[0], 32, 0, 1024), 2);
        assert_eq!(resident_blocks(ARCHS[0], 32, 100 * 1024, 1024), 1);
        assert_eq!(resident_blocks(ARCHS[2], 16, 0, 1024), 1);
        assert_eq!(resident_blocks(ARCHS[2], 255, 0, 1024), 0);
    }
}
