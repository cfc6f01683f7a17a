//! One entry of counters.json out of the emulator's counters of an operation's launches.

use std::fmt::Write as _;

use foveate_device_tests::launches::Work;
use serde_json::{Map, Value as Json, json};

/// What stands at the head of the file.
const ABOUT: &str = "Counted on the emulated driver by `cargo xtask counters`: work, not time. `modelled` is a bound from \
                     published throughputs, not a measurement; docs/profiling.md says how to read the rest.";

/// The sum of a number over launches; `path` as in [`Json::pointer`].
fn sum(launches: &[Json], path: &str) -> u64 {
    launches.iter().filter_map(|launch| launch.pointer(path)?.as_u64()).sum()
}

/// Sums of the numbers of an object, key by key; those that are 0 are left out.
fn sums(launches: &[Json], path: &str) -> Map<String, Json> {
    let objects = launches.iter().filter_map(|launch| launch.pointer(path)?.as_object());
    let mut names: Vec<&String> = objects.flat_map(Map::keys).collect();
    names.sort_unstable();
    names.dedup();
    let total = |name: &str| sum(launches, &format!("{path}/{}", name.replace('~', "~0").replace('/', "~1")));
    names.into_iter().map(|name| (name.clone(), json!(total(name)))).filter(|(_, n)| *n != json!(0)).collect()
}

/// The launches of one operation as an entry of the file.
pub(crate) fn entry(launches: &[Json], work: Work) -> Json {
    let kernels: Vec<&str> = launches.iter().filter_map(|launch| launch["kernel"].as_str()).collect();
    let mut global = Map::new();
    for kind in ["ld", "st", "atom", "cp_async"] {
        if sum(launches, &format!("/global/{kind}/requests")) > 0 {
            let count = |what: &str| sum(launches, &format!("/global/{kind}/{what}"));
            let uses = json!({
                "requests": count("requests"), "sectors": count("sectors"), "ideal_sectors": count("ideal_sectors"),
            });
            global.insert(kind.to_owned(), uses);
        }
    }
    let mut instructions = Map::from_iter([("all".to_owned(), json!(sum(launches, "/insts")))]);
    instructions.extend(sums(launches, "/insts_by_class"));
    let modelled: f64 = launches.iter().filter_map(|launch| launch["modelled_seconds"].as_f64()).sum();
    let bounds: Vec<&str> = launches.iter().filter_map(|launch| launch["modelled_bound"].as_str()).collect();
    json!({
        "kernels": kernels.join(" "),
        "launches": launches.len(),
        "instructions": instructions,
        "matrix": sums(launches, "/mma"),
        "global": global,
        "shared": sums(launches, "/shared"),
        "bytes": {
            "read": sum(launches, "/unique_bytes_read"),
            "written": sum(launches, "/unique_bytes_written"),
            "needed": work.bytes,
        },
        "flops": { "matrix": sum(launches, "/mma_flops"), "needed": work.flops },
        "barriers": sum(launches, "/barriers"),
        "modelled": { "us": (modelled * 1e8).round() / 100.0, "bound": bounds.join(" ") },
    })
}

/// The whole file. PTX, and so every count, is that of one version of nvcc.
pub(crate) fn file(nvcc: &str, entries: impl Iterator<Item = (String, Json)>) -> Json {
    let entries: Map<String, Json> = entries.collect();
    json!({ "about": ABOUT, "nvcc": nvcc, "entries": entries })
}

/// The file's text: a line for each part of an entry, so that a difference shows what changed and where.
pub(crate) fn text(file: &Json) -> String {
    let mut out = String::from("{\n");
    for key in ["about", "nvcc"] {
        let _ = writeln!(out, "  \"{key}\": {},", file[key]);
    }
    out.push_str("  \"entries\": {\n");
    let empty = Map::new();
    let entries = file["entries"].as_object().unwrap_or(&empty);
    for (i, (name, entry)) in entries.iter().enumerate() {
        let parts = entry.as_object().unwrap_or(&empty).iter();
        // What did not happen takes no line.
        let happened = parts.filter(|(_, part)| happened(part));
        let lines: Vec<String> = happened.map(|(key, part)| format!("      \"{key}\": {part}")).collect();
        let comma = if i + 1 < entries.len() { "," } else { "" };
        let _ = writeln!(out, "    {}: {{\n{}\n    }}{comma}", json!(name), lines.join(",\n"));
    }
    out.push_str("  }\n}\n");
    out
}

fn happened(part: &Json) -> bool {
    part.as_object().map_or(part != &json!(0), |object| object.values().any(happened))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launches() -> Vec<Json> {
        let one = json!({
            "kernel": "fv_a", "insts": 10, "insts_by_class": {"int": 7, "mma": 3, "sfu": 0}, "mma": {"m16n8k16.f16/x": 3},
            "mma_flops": 12288, "global": {"ld": {"requests": 2, "sectors": 8, "ideal_sectors": 4, "efficiency": 0.5}},
            "shared": {"requests": 1, "wavefronts": 3, "ideal": 1, "bank_conflicts": 2},
            "unique_bytes_read": 64, "unique_bytes_written": 32, "barriers": 1,
            "modelled_seconds": 2.5e-6, "modelled_bound": "int",
        });
        let mut two = one.clone();
        two["kernel"] = json!("fv_b");
        vec![one, two]
    }

    #[test]
    fn an_entry_is_the_sum_of_its_launches() {
        let entry = entry(&launches(), Work { bytes: 90, ..Work::default() });
        assert_eq!(entry["kernels"], "fv_a fv_b");
        assert_eq!(entry["launches"], 2);
        assert_eq!(entry["instructions"], json!({"all": 20, "int": 14, "mma": 6}));
        assert_eq!(entry["matrix"], json!({"m16n8k16.f16/x": 6}));
        assert_eq!(entry["global"], json!({"ld": {"requests": 4, "sectors": 16, "ideal_sectors": 8}}));
        assert_eq!(entry["shared"]["bank_conflicts"], 4);
        assert_eq!(entry["bytes"], json!({"read": 128, "written": 64, "needed": 90}));
        assert_eq!(entry["modelled"], json!({"us": 5.0, "bound": "int int"}));
    }

    #[test]
    fn the_text_is_the_file_with_a_line_for_each_part() {
        let entry = entry(&launches(), Work { bytes: 90, ..Work::default() });
        let entries = ["a/b2n3/f16", "c/b2n3/f16"].map(|name| (name.to_owned(), entry.clone()));
        let file = file("13.0.88", entries.into_iter());
        let text = text(&file);
        let read: Json = serde_json::from_str(&text).unwrap();
        assert_eq!(read, file);
        assert!(text.contains("\n      \"barriers\": 2,\n"), "{text}");
    }
}
