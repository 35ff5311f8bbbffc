//! The peak of a CPU run. A binary of its own, since the figure is that of the whole process, with the tests beside it.

use bfly::eval::bench::peak;
use candle_core::Device;

#[test]
fn the_peak_of_a_cpu_run_is_of_what_came_after_it_began() {
    let device = Device::Cpu;
    peak::begin_peak(&device);
    let before = peak::peak(&device);
    let held = std::hint::black_box(vec![1u8; 256 << 20]);
    let during = peak::peak(&device);
    assert!(during >= before + (192 << 20), "{before}, then {during} with {}", held.len());
    drop(held);
    peak::begin_peak(&device);
    let after = peak::peak(&device);
    assert!(after + (128 << 20) < during, "a new mark forgets the old one: {during}, then {after}");
}
