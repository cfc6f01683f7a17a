//! The benches' way to a GPU: criterion with the device's own clock where there is one, and where there is none what the
//! emulated driver counted, which is no time.

#[path = "../launches/mod.rs"]
#[allow(dead_code, unreachable_pub, reason = "the launches serve the counters and launch_one too")]
pub(crate) mod launches;

use std::{cell::Cell, fs, path::Path, rc::Rc, time::Duration};

use criterion::{
    BenchmarkId, Criterion, Throughput,
    measurement::{Measurement, ValueFormatter},
};
use cudarc::driver::{CudaEvent, sys::CUevent_flags};
use foveate::cuda::Device;
use launches::{
    Counted, Place, Units,
    timing::{Peak, Timer},
};
use serde_json::Value as Json;

/// Times all launches of a bench, or says why there is nothing to time and prints what was counted.
pub(crate) fn run(bench: &str) {
    match place() {
        Ok(place) => time(bench, &place),
        Err(reason) => {
            println!("{bench}: no GPU was timed: {reason}");
            print_counted(bench);
        }
    }
}

/// The device, unless it is the emulated one: what that takes is no GPU's time.
pub(crate) fn place() -> Result<Place, String> {
    let device = Device::new(0).map_err(|error| error.to_string())?;
    // Its name says so; whether it has the emulator's own functions cannot be asked where cudarc is linked (benches/peers).
    if device.name().starts_with("foveate emulator") {
        return Err(format!(
            "the driver in front is {}; where there is a GPU too, --target-dir target/gpu keeps it away",
            device.name()
        ));
    }
    Place::new(device).map_err(|error| error.to_string())
}

/// The device's clock, by events on the stream of the launches.
struct CudaTime {
    place: Place,
    rates: Rates,
}

impl CudaTime {
    fn event(&self) -> CudaEvent {
        let event = self.place.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.expect("an event on a stream that works")
    }
}

impl Measurement for CudaTime {
    type Intermediate = CudaEvent;
    /// Nanoseconds.
    type Value = f64;

    fn start(&self) -> CudaEvent {
        self.event()
    }

    fn end(&self, start: CudaEvent) -> f64 {
        f64::from(start.elapsed_ms(&self.event()).expect("events that were recorded")) * 1e6
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, nanoseconds: &f64) -> f64 {
        *nanoseconds
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &self.rates
    }
}

/// Times and rates in words. Bytes are bytes, elements operations.
struct Rates {
    /// What the device could do of what is being measured, a second.
    most: Rc<Cell<Option<f64>>>,
}

impl ValueFormatter for Rates {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        let (unit, factor) = if typical < 1e6 { ("µs", 1e-3) } else { ("ms", 1e-6) };
        values.iter_mut().for_each(|value| *value *= factor);
        unit
    }

    fn scale_throughputs(&self, _: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        let (amount, unit) = match *throughput {
            Throughput::Elements(n) => (n as f64 / 1e3, "TFLOP/s"),
            Throughput::Bytes(n) | Throughput::BytesDecimal(n) => (n as f64, "GB/s"),
            _ => (f64::NAN, "of something else"),
        };
        // Something a nanosecond is billions of it a second.
        values.iter_mut().for_each(|value| *value = amount / *value);
        unit
    }

    fn format_throughput(&self, throughput: &Throughput, nanoseconds: f64) -> String {
        let mut rate = [nanoseconds];
        let unit = self.scale_throughputs(nanoseconds, throughput, &mut rate);
        let (Throughput::Elements(amount) | Throughput::Bytes(amount)) = *throughput else {
            return format!("{:.1} {unit}", rate[0]);
        };
        let share = self.most.get().map(|most| 100.0 * amount as f64 * 1e9 / nanoseconds / most);
        format!(
            "{:.1} {unit}{}",
            rate[0],
            share.map(|share| format!(" ({share:.1} % of peak)")).unwrap_or_default()
        )
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        "ns"
    }
}

fn time(bench: &str, place: &Place) {
    let mut clocked = Bench::new(bench, place);
    for case in launches::timed(bench) {
        match Timer::new(place, &case, &clocked.peak) {
            Ok(timer) => {
                let id = BenchmarkId::new(case.shape.to_string(), case.dtype);
                clocked.time(case.operation.name, id, &timer);
            }
            Err(error) => println!("{case}: not timed: {error}"),
        }
    }
    clocked.finish();
}

/// Criterion with a device's clock.
pub(crate) struct Bench {
    pub(crate) peak: Peak,
    most: Rc<Cell<Option<f64>>>,
    criterion: Criterion<CudaTime>,
}

impl Bench {
    /// Prints what the device could do.
    pub(crate) fn new(name: &str, place: &Place) -> Self {
        let peak = Peak::of(place).expect("a driver that knows its device");
        let giga = |rate: Option<f64>| {
            rate.map_or_else(|| "unknown".to_owned(), |rate| format!("{:.0}", rate / 1e9))
        };
        println!(
            "{name}: foveate {} on {}; peak {} GB/s, {} GFLOP/s in f32, {} GFLOP/s in matrix instructions; up to 32 copies of \
             the tensors take turns, to come from memory and not from {} MiB of cache (no share of peak where they do not \
             suffice)",
            env!("CARGO_PKG_VERSION"),
            place.device.name(),
            giga(peak.bandwidth),
            giga(peak.f32_flops),
            giga(peak.matrix_flops),
            peak.cache_bytes >> 20
        );
        let most = Rc::new(Cell::new(None));
        let clock = CudaTime { place: place.clone(), rates: Rates { most: Rc::clone(&most) } };
        let criterion = Criterion::default()
            .with_measurement(clock)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(1))
            .sample_size(30)
            .configure_from_args();
        Self { peak, most, criterion }
    }

    /// Times launches unless the command line leaves them out; tells whether it has.
    pub(crate) fn time(&mut self, group: &str, id: BenchmarkId, timer: &Timer) -> bool {
        self.most.set(rate_of(timer, &self.peak));
        let mut timed = false;
        let mut group = self.criterion.benchmark_group(group);
        group.throughput(match timer.work.flops {
            0 => Throughput::Bytes(timer.work.bytes as u64),
            flops => Throughput::Elements(flops as u64),
        });
        group.bench_function(id, |b| {
            timed = true;
            b.iter_custom(|count| 1e9 * timer.seconds(count).expect("launches that were captured"));
        });
        group.finish();
        timed
    }

    pub(crate) fn finish(self) {
        self.criterion.final_summary();
    }
}

/// The most that a device does of what counts for a launch, a second.
fn rate_of(timer: &Timer, peak: &Peak) -> Option<f64> {
    match (timer.work.flops, timer.work.units) {
        (0, _) if timer.copies * timer.work.bytes < 2 * peak.cache_bytes => None,
        (0, _) => peak.bandwidth,
        (_, Units::Lanes) => peak.f32_flops,
        (_, Units::Matrix) => peak.matrix_flops,
    }
}

/// Prints what counters.json holds of a bench's operations.
fn print_counted(bench: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/counters.json");
    let read = fs::read_to_string(&file).map_err(|error| error.to_string());
    let json: Json =
        match read.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string())) {
            Ok(json) => json,
            Err(error) => {
                println!("{bench}: and nothing is known of the emulator's: {}: {error}", file.display());
                return;
            }
        };
    let cases = launches::timed(bench);
    if cases.iter().all(|case| case.operation.counted == Counted::Nowhere) {
        println!("{bench}: and nothing was counted: its kernels are not this crate's");
        return;
    }
    println!(
        "{bench}: counted on the emulated driver (benches/counters.json); modelled is a bound, not a measurement"
    );
    println!(
        "{:<36} {:>12} {:>10} {:>11} {:>10} {:>12}",
        "launch", "warp insts", "sectors", "KB moved", "of needed", "modelled µs"
    );
    let of_bench: Vec<&str> = cases.iter().map(|case| case.operation.name).collect();
    let entries = json["entries"].as_object().into_iter().flatten();
    for (name, entry) in
        entries.filter(|(name, _)| of_bench.iter().any(|op| name.split('/').next() == Some(op)))
    {
        let number = |at: &str| entry.pointer(at).and_then(Json::as_f64).unwrap_or(0.0);
        let global = entry["global"].as_object().into_iter().flatten();
        let sectors: u64 = global.filter_map(|(_, kind)| kind["sectors"].as_u64()).sum();
        let moved = number("/bytes/read") + number("/bytes/written");
        println!(
            "{name:<36} {:>12} {sectors:>10} {:>11.1} {:>10.3} {:>12.2}",
            number("/instructions/all"),
            moved / 1e3,
            moved / number("/bytes/needed"),
            number("/modelled/us")
        );
    }
}
