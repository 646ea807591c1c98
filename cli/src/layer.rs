//! Which layer's calls a command is about: arguments that several commands have.

use crate::DTypeArg;
use crate::models::{MODELS, Model, Op};
use moe_lora::Projection;

/// A layer with adapters.
#[derive(clap::Args)]
pub struct Layer {
    /// A model whose layer it is: qwen3-30b-a3b, gpt-oss-20b, olmoe-1b-7b or mixtral-8x7b. Of another give
    /// the next four
    #[arg(long, value_parser = model, conflicts_with_all = ["hidden", "intermediate", "experts", "top_k"])]
    model: Option<Model>,
    /// Width of a token
    #[arg(long)]
    hidden: Option<usize>,
    /// Width of an expert
    #[arg(long)]
    intermediate: Option<usize>,
    /// Experts of the layer
    #[arg(long)]
    experts: Option<usize>,
    /// Experts that a token chooses
    #[arg(long)]
    top_k: Option<usize>,
    /// Projections
    #[arg(long, value_delimiter = ',', default_value = "w13,w2")]
    pub op: Vec<Op>,
    /// Rank that the weights are allocated for
    #[arg(long, default_value_t = 64)]
    pub rank: usize,
    /// Adapter slots, all of which are used
    #[arg(long, default_value_t = 2)]
    adapters: usize,
    /// Type of activations and weights
    #[arg(long, default_value = "bf16")]
    dtype: DTypeArg,
}

fn model(name: &str) -> Result<Model, String> {
    let names = MODELS.map(|model| model.name).join(", ");
    MODELS.into_iter().find(|model| model.name == name).ok_or_else(|| format!("expected one of {names}"))
}

impl Layer {
    /// The model that is meant.
    ///
    /// # Errors
    /// Where arguments do not say which: an error of usage.
    pub fn model(&self) -> anyhow::Result<Model> {
        let own = || {
            let &Layer { hidden, intermediate, experts, top_k, .. } = self;
            let (hidden, intermediate) = (hidden?, intermediate?);
            Some(Model {
                name: "",
                hidden,
                intermediate,
                experts: experts?,
                top_k: top_k?,
                attention: [0; 2],
            })
        };
        self.model.or_else(own).ok_or_else(|| {
            let which =
                "which layer? give --model, or all of --hidden, --intermediate, --experts and --top-k\n";
            clap::Error::raw(clap::error::ErrorKind::MissingRequiredArgument, which).into()
        })
    }

    /// One of its projections.
    pub fn projection(&self, op: Op) -> anyhow::Result<Projection> {
        Ok(self.model()?.projection(op, self.rank, self.adapters, self.dtype.into())?)
    }
}
