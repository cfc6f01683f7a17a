//! Every golden file of a folder, one line each.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{Check, File, affnet, cluster, dynamicvit, evit, mctf, stems, svite, tome, vit};

/// Kinds of methods and models that are not built yet.
const PENDING: &[&str] = &[];

fn folder(root: &Path) -> PathBuf {
    if let Some(dir) = std::env::var_os("FOVEATE_GOLDEN_DIR") {
        return PathBuf::from(dir);
    }
    let shared = root.join("../shared/golden");
    if shared.is_dir() { shared } else { root.join("tests/golden") }
}

/// The check that a kind calls for; `None` for a kind that nobody knows.
fn run(kind: &str, file: &File, check: &mut Check) -> Option<()> {
    match kind {
        "tome_ops" => tome::ops(file, check),
        "tome_attn" => tome::attention(file, check),
        "tome_schedules" => tome::schedules(file, check),
        "tome_model" => tome::model(file, check),
        "mctf_ops" => mctf::ops(file, check),
        "mctf_schedules" => mctf::schedules(file, check),
        "mctf_model" => mctf::model(file, check),
        "evit_ops" => evit::ops(file, check),
        "evit_model" => evit::model(file, check),
        "evit_posresize" => evit::position_resize(file, check),
        "dynamicvit_predictor" => dynamicvit::predictors(file, check),
        "dynamicvit_model" => dynamicvit::model(file, check),
        "svite_selector" => svite::selector(file, check),
        "s2vite" => svite::structured(file, check),
        "svite_deit_sparse" => svite::model(file, check),
        "svite_layerwise_selector" => svite::layerwise(file, check),
        "bat_ops" => cluster::bat_ops(file, check),
        "bat_model" => cluster::bat_model(file, check),
        "mstm_ops" => cluster::mstm_ops(file, check),
        "mstm_model" => cluster::mstm_model(file, check),
        "reduction_counts" => evit::counts(file, check),
        "vit_weights" => vit::weights(file, check),
        "vit_model" => vit::model(file, check),
        "deit_distilled" => vit::distilled(file, check),
        "aff_op" => affnet::operation(file, check),
        "aff_block" => affnet::block(file, check),
        "affnet" => affnet::model(file, check),
        "t2tvit" => stems::t2tvit(file, check),
        "lvvit" => stems::lvvit(file, check),
        "dynamicvit_lvvit" => dynamicvit::lvvit(file, check),
        "dinov2_reg" => vit::registers(file, check),
        _ => return crate::more(kind, file, check),
    }
    Some(())
}

/// Runs every golden file of the folder; `root` is the package's own. What a test target's `main` returns.
pub(crate) fn all(root: &Path) -> ExitCode {
    // `cargo test -- --list` and filters come with arguments: this target is one test.
    if std::env::args().any(|arg| arg == "--list") {
        println!("golden: test");
        return ExitCode::SUCCESS;
    }
    let dir = folder(root);
    println!("golden files of {}", dir.display());
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(&dir) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) => {
            println!("golden: cannot read {}: {error}", dir.display());
            return ExitCode::FAILURE;
        }
    };
    paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors" || e == "json"));
    paths.sort();
    let only = std::env::var("FOVEATE_GOLDEN_ONLY").unwrap_or_default();
    paths.retain(|path| path.to_string_lossy().contains(&only));
    let (mut passed, mut failed, mut pending) = (0, 0, 0);
    println!("{:<38} {:<22} {:>9}  indices", "file", "kind", "error/tol");
    for path in &paths {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut check = Check::default();
        let outcome = File::open(path).map(|file| {
            let kind = file.kind();
            if PENDING.contains(&kind.as_str()) || crate::ELSEWHERE.contains(&kind.as_str()) {
                return (kind, false);
            }
            let known =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&kind, &file, &mut check)));
            match known {
                Ok(Some(())) => {}
                Ok(None) => check.fail(format!("unknown kind `{kind}`")),
                Err(_) => check.fail("panicked".into()),
            }
            (kind, true)
        });
        match outcome {
            Err(error) => {
                failed += 1;
                println!("{name:<38} {:<22} FAILED: {error}", "?");
            }
            Ok((kind, false)) => {
                let elsewhere = crate::ELSEWHERE.contains(&kind.as_str());
                pending += usize::from(!elsewhere);
                println!("{name:<38} {kind:<22} {:>9}", if elsewhere { "elsewhere" } else { "pending" });
            }
            Ok((kind, true)) => {
                if check.compared == 0 {
                    check.fail("nothing was compared".into());
                }
                println!("{name:<38} {kind:<22} {:>9.3}  {}", check.worst, check.indices());
                for failure in check.failures.iter().take(5) {
                    println!("    FAILED {failure}");
                }
                if check.failures.is_empty() { passed += 1 } else { failed += 1 }
            }
        }
    }
    if paths.is_empty() {
        println!("golden: no files in {}", dir.display());
    }
    println!("golden: {passed} passed, {failed} failed, {pending} pending");
    if failed > 0 || passed == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
