"""Break the library one line at a time and see the tests fail: `make mutants`. Exit code 1 if a mutant survives.

Each mutant names the tests that should notice it, so that a run takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

REGULARIZER = "tests/test_regularizer.py"
ISOLATION = "tests/test_isolation.py"
DDP = "tests/distributed/test_ddp.py"
FSDP2 = "tests/distributed/test_fsdp2.py"
AVERAGING = "tests/test_averaging.py"
SHARDED = "tests/distributed/test_sharded_averages.py"
PATCHING = "tests/test_patching.py"
CHECKPOINTS = "tests/test_checkpoints.py"
NAMES = "tests/test_names.py"
ATOMIC = "tests/test_atomic.py"
FOREIGN = "tests/test_foreign_checkpoints.py"
CHOOSING = "tests/test_choosing.py"
FILES = "tests/test_files.py"
UNMIXABLE = "tests/test_unmixable.py"
PATH = "tests/test_path.py"
SNAPSHOTS = "tests/test_snapshots.py"
CLI = "tests/test_cli.py"
KERNELS = "tests/test_kernels.py"
TEACHER = "tests/test_teacher.py"
LORA = "tests/test_lora.py"
DEPTH = "tests/test_depth.py"
PULLING = "tests/test_pulling.py"
THETA_ONLY = "tests/test_theta_only.py"

MUTANTS = [
    # file, line or part of it, what it becomes, tests
    ("regularizer.py", "self.strength / (1 - self.alpha)", "self.strength", REGULARIZER),
    ("regularizer.py", "self.strength / (1 - self.alpha)", "self.strength * (1 - self.alpha)", REGULARIZER),
    ("regularizer.py", "second, 1)", "second, self.strength)", REGULARIZER),
    ("regularizer.py", "loss_fn, first, self.strength, index)", "loss_fn, first, self.beta, index)", REGULARIZER),
    ("regularizer.py", "inner(self.model), loss_fn, first", "self.model, loss_fn, first", DDP),
    ("regularizer.py", "torch.lerp(p, anchor[n].to(p.device), self.alpha)", "torch.lerp(anchor[n].to(p.device), p, self.alpha)", REGULARIZER),
    ("regularizer.py", "            loss = _accumulate(self.model, loss_fn, second, 1)\n        self._end_call()", "            loss = _accumulate(self.model, loss_fn, second, 1)", REGULARIZER),
    ("regularizer.py", "if not self.strength or not (self.max_alpha or others):", "if False:", REGULARIZER),
    ("regularizer.py", "(self.max_alpha or others)", "self.max_alpha", REGULARIZER),
    ("regularizer.py", "loss_fn, batch, 1 + self.strength)", "loss_fn, batch, 1)", REGULARIZER),
    ("regularizer.py", "    if codes:", "    if False:", REGULARIZER),
    ("_alphas.py", "(f\"/{index}\" if index else \"\")", "\"\"", REGULARIZER),
    ("_alphas.py", "dist.get_rank() if not self._shared and _distributed() else 0", "0", DDP),
    ("_alphas.py", "not self._shared and _distributed()", "_distributed()", DDP),
    ("_alphas.py", "        if len(set(seeds)) > 1:", "        if False:", DDP),
    ("_alphas.py", "        if self._in_optimizer:", "        if False:", REGULARIZER),
    ("_alphas.py", "        self._optimizer_ends()  #", "        #", REGULARIZER),
    ("_alphas.py", "elif not self._held:", "else:", REGULARIZER),
    ("_alphas.py", "weakref.ref(sequence)", "lambda: sequence", REGULARIZER),
    ("regularizer.py", "generator.random() * total < 1", "generator.random() * total > 1", REGULARIZER),
    ("regularizer.py", "loss_fn, batch, total, index)", "loss_fn, batch, 1.0, index)", REGULARIZER),
    ("regularizer.py", "if has_reentrant_checkpoint(output):", "if False:", REGULARIZER),
    ("regularizer.py", "elif backward_pass != self._ended_by:", "elif False:", REGULARIZER),
    ("regularizer.py", "not 0 <= max_alpha < 1", "max_alpha < 0 or max_alpha >= 1", REGULARIZER),
    ("regularizer.py", "p).clone() for n, p", "p) for n, p", REGULARIZER),
    ("regularizer.py", "slice(half, None)", "slice(None, half)", REGULARIZER),
    ("regularizer.py", 'self.step, self.seed = int(state["step"])', "self.step, self.seed = 0", REGULARIZER),
    ("_strategies.py", "[anchor[name] for name in theta], alpha)", "[anchor[name] for name in theta], 1 - alpha)", REGULARIZER),
    ("_strategies.py", "a.to(p.device), alpha)", "a.to(p.device), 1 - alpha)", REGULARIZER),
    ("_strategies.py", "a.to(weight.device), alpha)", "a.to(weight.device), 1 - alpha)", REGULARIZER),
    ("_strategies.py", "[local(anchor[name]) for name in theta], alpha)", "[local(anchor[name]) for name in theta], 1 - alpha)", REGULARIZER),
    ("_strategies.py", ".grad = theta[name].grad, None", ".grad = None, None", REGULARIZER),
    ("_strategies.py", "    if leaked:", "    if False:", REGULARIZER),
    ("_strategies.py", "p.detach().clone() for p in others", "p for p in others", REGULARIZER),
    ("_strategies.py", "torch._foreach_copy_(shards(), backup)", "pass", REGULARIZER),
    ("_strategies.py", "torch._foreach_copy_(shards(), backup)", "torch._foreach_copy_(tensors, backup)", FSDP2),
    ("_strategies.py", "    torch.clear_autocast_cache()\n    reshard", "    reshard", REGULARIZER),
    ("_strategies.py", "    reshard(model)\n", "", FSDP2),
    ("_strategies.py", "p.grad = gradient\n", "pass\n", REGULARIZER),
    ("_strategies.py", "    if sharded:", "    if False:", FSDP2),
    ("_strategies.py", "    if hooked := _hooked(theta, \"_backward_hooks\"):", "    if False:", REGULARIZER),
    ("_strategies.py", "if strategy == wrong and", "if False and", REGULARIZER),
    ("_alphas.py", "        self.__dict__.update(state)\n        _follow_optimizers(self)", "        self.__dict__.update(state)", REGULARIZER),
    ("weights.py", "if other != name and", "if False and", "tests/test_weights.py"),
    ("weights.py", "    if cut:", "    if False:", "tests/test_weights.py"),
    ("weights.py", "    if empty:", "    if False:", AVERAGING),
    ("weights.py", "    if at_least is not None and number < at_least:", "    if False:", AVERAGING),
    ("files.py", "any(_is(os.fspath(output), checkpoint.path)", "any(False", FILES),
    ("path.py", "    if math.isnan(value):", "    if False:", PATH),
    ("_strategies.py", "distributed and through_wrapper", "False", DDP),
    ("_strategies.py", "distributed and not through_wrapper", "False", DDP),
    ("_sharding.py", "compiled.module if isinstance(compiled, DistributedDataParallel) else model", "model", DDP),
    ("_isolation.py", "        parametrize._cache = cast\n", "        pass\n", ISOLATION),
    ("_isolation.py", "cast, parametrize._cache = parametrize._cache, {}", "cast = parametrize._cache", ISOLATION),
    ("_isolation.py", "            vars(module).clear()\n", "", ISOLATION),
    ("_isolation.py", "            vars(module).update(own)\n", "            pass\n", ISOLATION),
    ("_isolation.py", "    if written:\n", "    if False:\n", ISOLATION),
    ("_isolation.py", "self.parameter.data = self._data", "pass", ISOLATION),
    ("_isolation.py", "if self.parameter._version != self._version:", "if False:", ISOLATION),
    ("_isolation.py", "return now is not None and", "return False and", ISOLATION),
    ("_isolation.py", "        if type(value) is tuple:", "        if False:", ISOLATION),
    ("_isolation.py", "copy[key] = self.of(item)", "pass", ISOLATION),
    ("_isolation.py", "copy[i] = self.of(item)", "pass", ISOLATION),
    ("_isolation.py", "copy = tensor.detach().clone()", "copy = tensor.detach()", ISOLATION),
    ("_isolation.py", "return tensor.clone()  #", "return tensor.detach().clone()  #", ISOLATION),
    ("_isolation.py", "self._copies[id(value)] = copy = value.copy()", "copy = value.copy()", ISOLATION),
    ("_sharding.py", "module.reshard()", "pass", FSDP2),
    ("_names.py", "if part not in _WRAPPERS", "", NAMES),
    ("kernels.py", "min(-(self.exponent + 1) *", "min(-self.exponent *", KERNELS),
    ("kernels.py", "i, p = _numbers(n), self.exponent + 1", "i, p = _numbers(n), self.exponent", KERNELS),
    ("kernels.py", "(1 - decays).log() - decays.log().cumsum(0)", "-decays.log().cumsum(0)", KERNELS),
    ("kernels.py", "self._rate * (n - 1))", "self._rate * n)", KERNELS),
    ("kernels.py", "(_numbers(n) - 0.5) / self.total", "(_numbers(n) - 0.5) / n", KERNELS),
    ("kernels.py", "logarithms[:-1].logsumexp(0)", "logarithms.logsumexp(0)", KERNELS),
    ("kernels.py", "        if n > self.total:", "        if False:", KERNELS),
    ("kernels.py", "n / (9 + n)", "n / (10 + n)", KERNELS),
    ("weights.py", "p.requires_grad and p.is_floating_point()", "p.requires_grad", REGULARIZER),
    ("weights.py", "        _overwrite({name: targets[name] for name in backup}, {}, backup)\n", "", "tests/test_weights.py"),
    ("weights.py", "    torch.clear_autocast_cache()", "    pass", "tests/test_weights.py"),
    ("weights.py", "else 0 <= number <= 1", "else not (number < 0 or number > 1)", PATCHING),
    ("weights.py", "precision = mixing_precision(theta.dtype)", "precision = theta.dtype", "tests/test_weights.py"),
    ("weights.py", "        return anchor.to(theta.dtype, copy=True)", "        return theta.clone()", PATCHING),
    ("weights.py", "anchor.to(precision), anchor_weight)", "anchor.to(precision), 1 - anchor_weight)", PATCHING),
    ("_averager.py", "return torch.float64", "return torch.float32", AVERAGING),
    ("_averager.py", "        self.buffers = _copied(persistent_buffers(self.model))\n        for", "        for", AVERAGING),
    ("_averager.py", "like(self._average(name), self.buffers[name])", "self.buffers[name]", AVERAGING),
    ("_averager.py", "if start_at == \"anchor\":", "if False:", AVERAGING),
    ("_averager.py", "self.weights, self.buffers, function)", "self.weights, {}, function)", TEACHER),
    ("_strategies.py", "value.detach().requires_grad_()", "value.detach()", TEACHER),
    ("_strategies.py", "[local(p).data for p in theta.values()]", "[local(p).clone() for p in theta.values()]", SHARDED),
    ("_strategies.py", "torch._foreach_copy_(shards(), backup)", "pass", SHARDED),
    ("_strategies.py", "return call_at(inner(model), stand_ins | leaves", "return call_at(model, stand_ins | leaves", SHARDED),
    ("_averager.py", "self.step <= self.start_step", "self.step < self.start_step", AVERAGING),
    ("_averager.py", "{**self.weights, **self.buffers}", "self.weights", AVERAGING),
    ("_averager.py", "local(own[name]).copy_(local(like(given, own[name])))", "pass", AVERAGING),
    ("_averager.py", "own[name] = tensor.to(torch.promote_types(tensor.dtype, given.dtype))", "own[name] = tensor", AVERAGING),
    ("_averager.py", "torch.promote_types(kept.dtype, self._kept_dtype(p))", "kept.dtype", AVERAGING),
    ("_averager.py", "        _check_shards(tensors, self._sets[0])\n", "", SHARDED),
    ("averaging.py", "if self.n_averaged else 1.0", "if self.n_averaged else 2.0", AVERAGING),
    ("averaging.py", "self.n_averaged + 1, self._total_weight)", "self.n_averaged + 2, self._total_weight)", AVERAGING),
    ("averaging.py", "{self.kernel})\"", "...)\"", AVERAGING),
    ("averaging.py", "torch._foreach_mul_(sums, scale)", "pass", AVERAGING),
    ("averaging.py", "            weight *= scale\n", "", AVERAGING),
    ("kernels.py", "max(decay, 2.0**-900)", "decay", AVERAGING),
    ("averaging.py", "part.add_(more.double(), alpha=weight)", "part.add_(more, alpha=1)", AVERAGING),
    ("averaging.py", "self._sets[self.n_averaged % len(self._sets)]", "self._sets[0]", AVERAGING),
    ("averaging.py", "min(self.n_averaged + 1, len(self._sets))", "len(self._sets)", AVERAGING),
    ("weights.py", "if slot.key not in slot.owner._non_persistent_buffers_set", "if True", AVERAGING),
    ("weights.py", "slot.register(targets[name])", "pass", "tests/test_weights.py"),
    ("weights.py", "target.shape == value.shape and not expanded", "target.shape == value.shape", "tests/test_weights.py"),
    ("weights.py", "target.shape == value.shape and not expanded", "not expanded", AVERAGING),
    ("batchnorm.py", "dist.all_reduce(self.sums)", "pass", SHARDED),
    ("batchnorm.py", "buffer.copy_(own)", "pass", "tests/test_batchnorm.py"),
    ("batchnorm.py", "* n / (n - 1)", "", "tests/test_batchnorm.py"),
    ("batchnorm.py", "and not _frozen(m, model)", "", "tests/test_batchnorm.py"),
    ("batchnorm.py", "        model.eval()\n", "", "tests/test_batchnorm.py"),
    ("_operations.py", "dict.fromkeys(fitting, weight) | ratios", "ratios | dict.fromkeys(fitting, weight)", PATCHING),
    ("_operations.py", "torch.where(equal, first, mixed)", "mixed", PATCHING),
    ("_operations.py", "    if wrong:", "    if False:", PATCHING),
    ("_operations.py", "total + scale *", "total - scale *", PATCHING),
    ("patching.py", " and name not in kept}", "}", PATCHING),
    ("_operations.py", "name.rpartition(\".\")[2] not in (*_BATCH_NORM_BUFFERS, _EXTRA_STATE)", "True", PATCHING),
    ("patching.py", "    check_mixable(*named)\n", "", UNMIXABLE),
    ("_unmixable.py", "        if factors:", "        if False:", UNMIXABLE),
    ("_unmixable.py", "        if codes:", "        if False:", UNMIXABLE),
    ("_unmixable.py", 'and not beside("fake_quant_enabled")', "", UNMIXABLE),
    ("_unmixable.py", "any(scale not in _FLOAT8 for", "any(True for", UNMIXABLE),
    ("_unmixable.py", " or bool(scales) or", " or", UNMIXABLE),
    ("_unmixable.py", "_kind(dtype) != _kind(others_dtype)", "False", UNMIXABLE),
    ("_pickled.py", "weights_only=True", "weights_only=False", CHECKPOINTS),
    ("_pickled.py", "if len(candidates) > 1:", "if False:", FOREIGN),
    ("_pickled.py", "if self._flat is None or self._flat[0] != name:", "if self._flat is None:", FOREIGN),
    ("_pickling.py", "if isinstance(tensor, nn.Parameter):", "if False:", FOREIGN),
    ("_pickling.py", "if not all(same_bits(", "if False and not all(same_bits(", FOREIGN),
    ("_pickling.py", "-(file.tell() + header) % _ALIGNMENT", "0", FOREIGN),
    ("_safetensors.py", "start != end or stop - start != entry.n_bytes or 8 + length + stop > size", "False", FOREIGN),
    ("_tensors.py", "tensor.detach().resolve_conj().resolve_neg().contiguous()", "tensor.detach()", FOREIGN),
    ("_names.py", "(DistributedDataParallel, DataParallel, AveragedModel)", "DistributedDataParallel", NAMES),
    ("_names.py", "{prefix + name for name in shorter} == set(longer)", "True", NAMES),
    ("atomic.py", "        os.replace(temporary, target)\n", "        shutil.copy(temporary, target)\n", CHECKPOINTS),
    ("atomic.py", "target = os.path.realpath(target)", "pass", ATOMIC),
    ("atomic.py", "            if is_ours:\n", "            if True:\n", ATOMIC),
    ("atomic.py", "(name == last, name)", "name", ATOMIC),
    ("_places.py", "if name + INDEX in found]", "if False]", FOREIGN),
    ("reports.py", "math.hypot(*pair)", "sum(x**2 for x in pair) ** 0.5", FILES),
    ("_operations.py", "return len(inputs) == len(hashes) and", "return", FILES),
    ("files.py", "if final else", "if not final else", FILES),
    ("inspection.py", "checkpoint.sha256() != digest", "False", FILES),
    ("inspection.py", "        problems += _unmatched(", "        _ = (", FILES),
    ("_recipes.py", "os.path.relpath(path, folder) if folder else path", "path", FILES),
    ("files.py", "{**recipe, \"inputs\": [seen_from(folder, path) for path in inputs]", "{**recipe, \"inputs\": inputs", FILES),
    ("patching.py", "sides=(sides[0], side))", ")", FILES),
    ("reports.py", "or not all(same_bits", "or not all(torch.equal", FILES),
    ("_tensors.py", "a.dtype is b.dtype and ", "", FILES),
    ("reports.py", "but_for_equals=True) for", "but_for_equals=False) for", FILES),
    ("reports.py", "        return tensor.to(torch.complex128)", "        return tensor.real.to(torch.float64)", FILES),
    ("reports.py", "bool(self.unmatched) or any", "any", FILES),
    ("reports.py", "tensor = torch.view_as_real(tensor)", "return 0", FILES),
    ("_operations.py", "if ratios.keys() >= {*fitting}", "if False", PATCHING),
    ("patching.py", "compiled(recipe, list(weights), len(sources))", "compiled(recipe, list(first), len(sources))", PATCHING),
    ("_arguments.py", '"=" in rest[start + 1] and ', "", CLI),
    ("choosing.py", "lowest[i] <= 0", "lowest[i] > 0", CHOOSING),
    ("choosing.py", "all(b >= a for a, b", "any(b >= a for a, b", CHOOSING),
    ("choosing.py", "if data == self.data:", "if False:", CHOOSING),
    ("searching.py", "_LARGEST = 4", "_LARGEST = 0", CHOOSING),
    ("snapshots.py", "if step % self.every:", "if False:", SNAPSHOTS),
    ("snapshots.py", "return DISTRIBUTED_INDEX in names", "return True", SNAPSHOTS),
    ("snapshots.py", "**source.weights, **source.buffers}", "}", SNAPSHOTS),
    ("synthesis.py", "weights[::-1], {\"kernel\"", "weights, {\"kernel\"", SNAPSHOTS),
    ("synthesis.py", "if distance > _TOO_FAR", "if False", SNAPSHOTS),
    ("_distributed.py", "if start is None:", "if False:", FOREIGN),
    ("_operations.py", "alpha=share", "alpha=1", FILES),
    ("__main__.py", "        return 130", "        raise", CLI),
    ("__main__.py", "return int(report.differs)", "return 0", CLI),
    ("__main__.py", "raise error.own from None", "raise", CLI),
    ("_arguments.py", "if not f\"{module}.\".startswith(f\"{error.name}.\"):", "if False:", CLI),
    ("_adapters.py", "new.div_(1 - alpha)", "new.mul_(1)", LORA),
    ("_adapters.py", "with self.scaled(1 - alpha):", "with self.scaled(alpha):", LORA),
    ("_adapters.py", "        finally:\n            for layer, scaling", "        except ValueError:\n            for layer, scaling", LORA),
    ("_adapters.py", "getattr(layer, \"lora_variant\", None)", "False", LORA),
    ("lora.py", "(s / scale)", "(scale / s)", LORA),
    ("lora.py", "math.sqrt(r) if self.config.get(\"use_rslora\") else r", "r", LORA),
    ("lora.py", "values[rank:]", "values[rank + 1:]", LORA),
    ("lora.py", "fitting[0] if fitting else", "fitting[0] if False else", LORA),
    ("lora.py", "        if wrong := [key for key in _UNKNOWN", "        if wrong := [key for key in ()", LORA),
    ("depth.py", "first + (last - first) * i", "last + (first - last) * i", DEPTH),
    ("depth.py", "/ (len(tower) - 1)", "/ len(tower)", DEPTH),
    ("depth.py", "weights | {\"*\": first}", "{\"*\": first} | weights", DEPTH),
    ("depth.py", "tower = container.rstrip(\"0123456789\")", "tower = container", DEPTH),
    ("pulling.py", "lerp(shard, other, weight)", "lerp(other, shard, weight)", PULLING),
    ("pulling.py", "target.detach().to(toward.dtype)", "target", PULLING),
    ("pulling.py", "        _pulled(name, target, toward[name], weight)  #", "        pass  #", PULLING),
    ("pulling.py", "    torch.clear_autocast_cache()", "    pass", PULLING),
    ("_theta_only.py", "if name not in self.own}\n\n    def paired", "}\n\n    def paired", THETA_ONLY),
    ("_theta_only.py", "theta.detach()[n:].to(wide)", "anchor[n:].to(wide)", THETA_ONLY),
    ("_theta_only.py", "            if not fitting:", "            if False:", THETA_ONLY),
    ("_theta_only.py", "        self._check_rows(theta, paired)", "        pass", THETA_ONLY),
    ("_theta_only.py", "theta.detach()[n:].to(wide)", "theta.detach()[n:].to(anchor)", THETA_ONLY),
    ("_adapters.py", "s * factor if k in self._trained else s", "s * factor", LORA),
    ("_adapters.py", "        _check_base(", "        (lambda *_: None)(", LORA),
    ("_mixing.py", "others = others[: self.n_averaged - 1]", "pass", CHOOSING),
    ("_mixing.py", "            wide = first.to(mixing_precision(first.dtype))", "            wide = first", CHOOSING),
    ("_mixing.py", "self.parts if i >= self.n_averaged", "self.parts if True", CHOOSING),
    ("searching.py", "parts.completed(name, anchor[name], mean[name])", "anchor[name]", CHOOSING),
    ("path.py", "self.n += 1", "pass", PATH),
    ("path.py", "[(total / self.n).to(dtype), tensor]", "[tensor, total]", PATH),
    ("path.py", "self.sums[name] = summed([total, weights[name]])", "pass", PATH),
    ("path.py", "(1 - w) * loss[0] + w * loss[1]", "w * loss[0] + (1 - w) * loss[1]", PATH),
    ("path.py", "if value >= best:", "if True:", PATH),
    ("lightning.py", "regularizer.strength / trainer.accumulate_grad_batches", "regularizer.strength", "tests/test_lightning.py"),
    ("transformers.py", "self._backward_scaled(regularizer.strength)", "self._backward_scaled(1.0)", "tests/test_transformers.py"),
]  # fmt: skip


def survives(file: str, line: str, mutant: str, tests: str) -> bool:
    """Whether the tests pass with the mutant in place."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("interpolate", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder, "interpolate", file)
        text = path.read_text()
        if line not in text:
            raise ValueError(f"interpolate/{file} no longer contains {line!r}; bring the list of mutants up to date.")
        path.write_text(text.replace(line, mutant))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 2 and above: no test was run
        raise RuntimeError(f"{tests} could not be run with {mutant!r} in {file}:\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> int:
    wanted = sys.argv[1:]
    survivors = 0
    for number, mutant in enumerate(MUTANTS):
        if wanted and not any(word in mutant[0] for word in wanted):
            continue
        alive = survives(*mutant)
        survivors += alive
        file, line, became, _ = mutant
        fate = "SURVIVED" if alive else "killed"
        print(f"{number + 1:3}/{len(MUTANTS)} {fate:8} {file}: {line!r} -> {became!r}", flush=True)
    print(f"{survivors} mutants survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
