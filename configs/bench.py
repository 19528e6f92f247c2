"""The sizes of benchmarks/torch_step.py, so that one step here and one step in PyTorch can be compared.

moextend bench bench
python benchmarks/compare.py     both in one go, with the ratio
"""

from pathlib import Path

from ml_collections import ConfigDict

from moextend_jax.settings import EvaluateSettings, OptimizerConfig, RunSettings, StageSettings, to_config_dict

MODEL = Path(__file__).parent / "bench_model"


def get_config() -> ConfigDict:
    """Batch 4 x 512 tokens, one image of 64 patches per row; `data` is not read, weights are random."""

    def stage(learning_rate: float) -> StageSettings:
        optimizer = OptimizerConfig(learning_rate=learning_rate)
        return StageSettings(data="none", steps=100, batch_size=4, length=512, loss_chunk=512, optimizer=optimizer)

    return to_config_dict(
        RunSettings(
            align=stage(1e-3),
            extend=stage(1e-3),
            finetune=stage(2e-5),
            full=stage(2e-5),
            evaluate=EvaluateSettings(data="none", questions=1),
            base=str(MODEL),
            vision=str(MODEL / "vision"),
            dtype="float32",
            remat="none",
        )
    )
