//! Which tensors are taken, and where in them is written. On candle's CPU device.

use candle_core::{DType, Device, Tensor};
use moe_lora::{OutDims, ProjectionSizes};
use moe_lora_candle_example::{Delta, Error, MoeLora, Routing};

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// Of one adapter of rank 1, two experts, one choice a token: sums of a row of x, in each column of out.
struct Call {
    operator: MoeLora,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    topk_ids: Tensor,
    token_lora: Tensor,
}

impl Call {
    fn new(dtype: DType) -> Result<Self> {
        let half = if dtype == DType::F16 { moe_lora::DType::F16 } else { moe_lora::DType::Bf16 };
        let sizes = ProjectionSizes {
            dtype: half,
            out_dims: OutDims::uniform(3, 1),
            experts: 2,
            max_rank: 1,
            ..ProjectionSizes::gate_up(4, 3)
        };
        let [operator] = MoeLora::new(&Device::Cpu, 2, [sizes]).expect("legal sizes");
        let ones = |shape: &[usize]| Tensor::ones(shape, dtype, &Device::Cpu);
        let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu);
        let (x, a, b) = (ones(&[2, 4])?, ones(&[1, 2, 1, 4])?, ones(&[1, 2, 3, 1])?);
        Ok(Call {
            operator,
            x,
            a,
            b,
            topk_ids: ids(&[1, 0])?.unsqueeze(1)?,
            token_lora: ids(&[u32::MAX, 0])?,
        })
    }

    fn add(&self, x: &Tensor, a: &Tensor, out: &Tensor) -> Result<(), Error> {
        let Call { topk_ids, token_lora, .. } = self;
        let routing = Routing::Tokens { topk_ids, token_lora, ranks: None };
        let (a, b) = (std::slice::from_ref(a), std::slice::from_ref(&self.b));
        self.operator.add(&Delta { x, a, b, routing, topk_weights: None }, out).map(drop)
    }
}

#[test]
fn a_part_of_a_tensor_is_used_where_it_lies() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let call = Call::new(dtype)?;
        let (xs, outs) =
            (Tensor::ones((4, 4), dtype, &Device::Cpu)?, Tensor::ones((4, 1, 3), dtype, &Device::Cpu)?);
        call.add(&xs.narrow(0, 2, 2)?, &call.a, &outs.narrow(0, 1, 2)?).expect("contiguous tensors");
        // The first of the two tokens has no adapter.
        let rows = outs.to_dtype(DType::F32)?.flatten_from(1)?.to_vec2::<f32>()?;
        assert_eq!(rows, [[1.0; 3], [1.0; 3], [5.0; 3], [1.0; 3]]);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<()> {
    let call = Call::new(DType::BF16)?;
    let out = Tensor::zeros((2, 1, 3), DType::BF16, &Device::Cpu)?;
    let wide = Tensor::ones((2, 8), DType::BF16, &Device::Cpu)?;
    let refused = [
        (
            call.add(&wide, &call.a, &out),
            "x is BF16 [2, 8] with strides [8, 1], expected BF16 [2, 4], contiguous",
        ),
        (call.add(&wide.narrow(1, 0, 4)?, &call.a, &out), "x is BF16 [2, 4] with strides [8, 1], expected"),
        (
            call.add(&call.x.to_dtype(DType::F32)?, &call.a, &out),
            "x is F32 [2, 4] with strides [4, 1], expected BF16",
        ),
        (call.add(&call.x, &call.a.transpose(2, 3)?, &out), "a is BF16 [1, 2, 4, 1]"),
        (call.add(&call.x, &call.a, &out.squeeze(1)?), "out is BF16 [2, 3]"),
    ];
    for (result, expected) in refused {
        let error = result.expect_err(expected);
        assert!(matches!(error, Error::Tensor(..)) && error.to_string().starts_with(expected), "{error}");
    }

    let shared = Tensor::zeros((2, 7), DType::BF16, &Device::Cpu)?.flatten_all()?;
    let (x, out) = (shared.narrow(0, 0, 8)?.reshape((2, 4))?, shared.narrow(0, 8, 6)?.reshape((2, 1, 3))?);
    assert!(matches!(call.add(&x, &call.a, &out), Err(Error::SharedStorage("x"))));
    assert_eq!(shared.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0.0; 14]);
    Ok(())
}
