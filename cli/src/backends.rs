//! The back ends of this machine. All that this program knows of CUDA, and of the emulated machine, is here.

use clap::ValueEnum;
use moe_lora::cpu::Cpu;
#[cfg(feature = "cuda")]
use moe_lora::cuda::{Device, EMBEDDED, Embedded, LoadedFrom, Stream};
#[cfg(feature = "emulate")]
use moe_lora::emulated::Emulated;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora::plan::Options;
#[cfg(feature = "cuda")]
use moe_lora::plan::{RouteSource, Stage};
use moe_lora::{Backend, Element, Forward, Projection, Result};
use moe_lora_verify::{Case, Failure, Outcome, check_each};
use std::fmt;
use std::time::{Duration, Instant};

/// Which back ends to use.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The GPU where there is one; demo and verify run on the CPU too
    Auto,
    /// The CPU
    Cpu,
    /// The GPU, or fail
    Cuda,
    /// The GPU's kernels on the CPU, with every access checked; only in verify
    #[cfg(feature = "emulate")]
    Emulated,
}

/// What this machine has.
pub struct Machine {
    cpu: Cpu,
    #[cfg(feature = "cuda")]
    gpu: Result<Device>,
}

/// One back end.
pub enum Place<'m> {
    /// The CPU.
    Cpu(&'m Cpu),
    /// A stream of the GPU.
    #[cfg(feature = "cuda")]
    Cuda(Stream),
}

/// One back end in every way that it can be made to work.
pub enum Ways<'m> {
    /// The CPU has one.
    Cpu(&'m Cpu),
    /// The GPU: as the planner chooses, and every index width with every tile.
    #[cfg(feature = "cuda")]
    Cuda(Vec<Stream>),
    /// The emulated machine: as the GPU.
    #[cfg(feature = "emulate")]
    Emulated(Vec<Emulated>),
}

impl Ways<'_> {
    /// Checks a case in all of them.
    pub fn check(&self, case: &Case) -> Result<Vec<Outcome>, Box<Failure>> {
        match self {
            &Ways::Cpu(cpu) => check_each([cpu], case),
            #[cfg(feature = "cuda")]
            Ways::Cuda(streams) => check_each(streams, case),
            #[cfg(feature = "emulate")]
            Ways::Emulated(machines) => check_each(machines, case),
        }
    }
}

impl fmt::Display for Ways<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ways::Cpu(_) => f.pad("cpu"),
            #[cfg(feature = "cuda")]
            Ways::Cuda(streams) => f.pad(&format!("cuda, in {} ways", streams.len())),
            #[cfg(feature = "emulate")]
            Ways::Emulated(machines) => f.pad(&format!("emulated, in {} ways", machines.len())),
        }
    }
}

/// Seed of the emulated machine's first launch: the same faults are found each time.
#[cfg(feature = "emulate")]
const EMULATED_SEED: u64 = 1;

/// `$body` with the back end behind a [`Place`], whatever its type.
macro_rules! with_backend {
    ($place:expr, $backend:ident => $body:expr) => {
        match $place {
            &$crate::backends::Place::Cpu($backend) => $body,
            #[cfg(feature = "cuda")]
            $crate::backends::Place::Cuda($backend) => $body,
        }
    };
}
pub(crate) use with_backend;

impl Machine {
    /// Looks for a GPU.
    pub fn find() -> Self {
        Machine {
            cpu: Cpu,
            #[cfg(feature = "cuda")]
            gpu: Device::new(0),
        }
    }

    /// Why there is no GPU to use; `None` when there is one.
    pub fn missing(&self) -> Option<String> {
        #[cfg(feature = "cuda")]
        return self.gpu.as_ref().err().map(ToString::to_string);
        #[cfg(not(feature = "cuda"))]
        Some("this program was built without the feature `cuda`".into())
    }

    /// The kernels in this program: who compiled them, for what.
    pub fn kernels() -> Vec<String> {
        #[cfg(feature = "cuda")]
        return EMBEDDED.iter().map(describe).collect();
        #[cfg(not(feature = "cuda"))]
        Vec::new()
    }

    /// The back end to use: for [`Choice::Auto`] the fastest.
    pub fn one(&self, choice: Choice) -> anyhow::Result<Place<'_>> {
        let mut places = self.each(choice)?;
        Ok(places.pop().expect("there is always a CPU"))
    }

    /// All back ends to use: for [`Choice::Auto`] those that are here, the CPU first.
    pub fn each(&self, choice: Choice) -> anyhow::Result<Vec<Place<'_>>> {
        #[cfg(feature = "emulate")]
        anyhow::ensure!(choice != Choice::Emulated, "the emulated machine is for moe-lora verify alone");
        let mut places = Vec::new();
        if choice != Choice::Cuda {
            places.push(Place::Cpu(&self.cpu));
        }
        #[cfg(feature = "cuda")]
        places.extend(self.streams(choice, &[Options::default()])?.into_iter().map(Place::Cuda));
        self.require(choice)?;
        Ok(places)
    }

    /// For each back end to use, every way that it can be made to work.
    pub fn ways(&self, choice: Choice) -> anyhow::Result<Vec<Ways<'_>>> {
        #[cfg(feature = "emulate")]
        if choice == Choice::Emulated {
            let machine = |options| Emulated::new(options, EMULATED_SEED);
            return Ok(vec![Ways::Emulated(Options::every().into_iter().map(machine).collect())]);
        }
        let mut all = Vec::new();
        if choice != Choice::Cuda {
            all.push(Ways::Cpu(&self.cpu));
        }
        #[cfg(feature = "cuda")]
        {
            let streams = self.streams(choice, &Options::every())?;
            all.extend((!streams.is_empty()).then_some(Ways::Cuda(streams)));
        }
        self.require(choice)?;
        Ok(all)
    }

    /// Refuses [`Choice::Cuda`] where there is no GPU.
    fn require(&self, choice: Choice) -> anyhow::Result<()> {
        match self.missing() {
            Some(reason) if choice == Choice::Cuda => {
                anyhow::bail!("{reason}; --backend cpu works on any machine")
            }
            _ => Ok(()),
        }
    }

    /// A stream for each of `options`; none where there is no GPU or it is not wanted.
    #[cfg(feature = "cuda")]
    fn streams(&self, choice: Choice, options: &[Options]) -> Result<Vec<Stream>> {
        match &self.gpu {
            Ok(gpu) if choice != Choice::Cpu => {
                options.iter().map(|&options| gpu.new_stream_with(options)).collect()
            }
            _ => Ok(Vec::new()),
        }
    }
}

impl fmt::Display for Machine {
    /// A line for each back end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        write!(f, "cpu      {threads} threads")?;
        #[cfg(feature = "cuda")]
        match &self.gpu {
            Ok(gpu) => {
                let (info, module) = (gpu.info(), gpu.kernels());
                let rate = f64::from(info.memory_rate) / 1e6;
                write!(f, "\ncuda     {info}, {} MiB L2, memory of {rate:.2} TB/s", info.l2_bytes >> 20)?;
                let from = match gpu.loaded_from() {
                    LoadedFrom::Cubin => "from their cubin".to_owned(),
                    LoadedFrom::Ptx { cubin_refused: None } => {
                        "compiled by the driver from their PTX".to_owned()
                    }
                    LoadedFrom::Ptx { cubin_refused: Some(reason) } => {
                        format!("compiled by the driver from their PTX; it refused the cubin: {reason}")
                    }
                };
                write!(f, "\n         runs the {} kernels, {from}", module.arch)?;
                if !module.have_run() {
                    write!(
                        f,
                        "\n         which have never run on such a device before: moe-lora verify checks them"
                    )?;
                }
            }
            Err(reason) => write!(f, "\ncuda     {reason}")?,
        }
        #[cfg(not(feature = "cuda"))]
        write!(f, "\ncuda     {}", self.missing().unwrap_or_default())?;
        Ok(())
    }
}

/// One generation's kernels in a line: who made them, how large they are, and whether that is all that is
/// known of them.
#[cfg(feature = "cuda")]
fn describe(kernels: &Embedded) -> String {
    let Embedded { made_by, ptx, cubin, .. } = kernels;
    let known = if kernels.have_run() { "" } else { "; compiled and assembled, never run" };
    let cubin = match cubin {
        Some(cubin) => format!("{} KiB of cubin by ptxas {}", cubin.image.unpacked_len() >> 10, cubin.ptxas),
        None => "no cubin".to_owned(),
    };
    format!("{made_by}: {} KiB of PTX, {cubin}{known}", ptx.unpacked_len() >> 10)
}

/// A back end that knows how long its work takes.
pub trait Timed: Backend {
    /// Bytes per second that its memory moves at best, when known.
    fn bandwidth(&self) -> Option<f64>;

    /// How it does a call, in a word or two.
    fn kernel<T: Element>(
        &self,
        projection: &Projection,
        call: &Forward<'_, Self::Space, T>,
    ) -> Result<String>;

    /// Median time of the `calls` calls that `work` queues, one call. `work` is repeated, and must queue
    /// only.
    fn time(&self, calls: usize, work: impl FnMut() -> Result<()>) -> Result<Duration>;
}

/// The CPU repeats its work for this long.
const CPU_BUDGET: Duration = Duration::from_millis(500);

impl Timed for Cpu {
    fn bandwidth(&self) -> Option<f64> {
        None
    }

    fn kernel<T: Element>(&self, _: &Projection, _: &Forward<'_, Self::Space, T>) -> Result<String> {
        Ok("all cores".into())
    }

    fn time(&self, calls: usize, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.is_empty() || start.elapsed() < CPU_BUDGET {
            let start = Instant::now();
            work()?;
            times.push(start.elapsed() / calls as u32);
        }
        Ok(median(times))
    }
}

/// The GPU replays its work this often.
#[cfg(feature = "cuda")]
const GPU_REPEATS: usize = 50;

#[cfg(feature = "cuda")]
impl Timed for Stream {
    fn bandwidth(&self) -> Option<f64> {
        Some(self.device().limits().streamed() * 1e6)
    }

    fn kernel<T: Element>(
        &self,
        projection: &Projection,
        call: &Forward<'_, Self::Space, T>,
    ) -> Result<String> {
        let plan = self.plan(projection, &call.check(projection)?, Stage::Forward, RouteSource::Made)?;
        Ok(plan.map_or("nothing".into(), |plan| {
            format!("{:?} {:?}", plan.index_width(), plan.form()).to_lowercase()
        }))
    }

    fn time(&self, calls: usize, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
        work()?;
        let times = self.capture(|_| work())?.time(GPU_REPEATS)?;
        Ok(median(times.iter().map(|time| Duration::from_secs_f64(time * 1e-6 / calls as f64)).collect()))
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
