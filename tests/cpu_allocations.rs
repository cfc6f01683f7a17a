//! A forward pass that is repeated takes no memory from the system: everything comes back to the backend.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use foveate::{
    Images, Pixels, Reduction,
    cpu::{Cpu, Products},
    model::{Vit, VitConfig, arch},
    reduction::OwnWeights,
};

/// The system's allocator, counted.
struct Counted;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator as it comes.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// One test only: another one's allocations would be counted.
#[test]
fn a_repeated_forward_pass_allocates_nothing() {
    let config = VitConfig { image: [64, 64], depth: 4, ..arch::config("deit_tiny").unwrap() };
    let pixels = (0..2 * 3 * 64 * 64).map(|i| (i * 31 % 251) as u8).collect();
    let images = Images::new([2, 3, 64, 64], Pixels::U8(pixels)).unwrap();
    for (threads, products) in [1, 2].into_iter().flat_map(|n| [(n, Products::F32), (n, Products::Bf16)]) {
        if let Err(missing) = products.check() {
            println!("SKIPPED with {}: {missing}", products.name());
            continue;
        }
        let own = OwnWeights { predictors: 3, selector: true, layer_selectors: 4, projections: 1 << 2 };
        let mut params = arch::random_params(&config, 3);
        params.reducers = arch::random_reducers(&config, own, 4);
        let cpu = Cpu::with_threads(threads).unwrap().with_products(products).unwrap();
        let vit = Vit::new(cpu, config.clone(), params).unwrap();
        for spec in [
            "none",
            "tome:r=2",
            "mctf:r=2",
            "mctf:r=2,ahead=0",
            "mctf:r=2,pool=max",
            "evit:keep=0.6",
            "bat",
            "bat:keep=0.6,neighbours=3",
            "mstm",
            "mstm:scales=2/3",
            "dynamicvit",
            "svite:tokens=9",
            "svite:tokens=9,layerwise=true",
        ] {
            let reduction: Reduction = spec.parse().unwrap();
            let mut output = vit.forward(&images, &reduction).unwrap();
            for _ in 0..2 {
                output = vit.forward_again(&images, &reduction, output).unwrap();
            }
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            output = vit.forward_again(&images, &reduction, output).unwrap();
            let after = ALLOCATIONS.load(Ordering::Relaxed);
            assert_eq!(after - before, 0, "{spec} with {threads} threads, {products:?}");
            drop(output);
        }
    }
}
