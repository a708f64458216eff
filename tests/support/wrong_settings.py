"""Wrong settings, in a file or after the command: rows for the table of wrong_inputs."""

SETTINGS = """
# Settings.
an unknown setting = train config.yaml optimizer.peak_rate=1.0
    command line: optimizer.peak_rate: ... did you mean peak_lr?
an unknown setting in the file = train sede.yaml
    sede.yaml:22: run.sede: ... did you mean seed?
an unknown section = train config.yaml optimiser.steps=5
    command line: optimiser: ... did you mean optimizer?
an override that is none = train config.yaml steps=5
    steps=5: an override is section.setting=value, such as optimizer.peak_lr=1.0e-4
an override of a section = train config.yaml optimizer=5
    optimizer=5: an override is section.setting=value, such as optimizer.peak_lr=1.0e-4
an empty path = train config.yaml data.store=
    command line: data.store: is missing; set it in the file or as an override
a number as path = train config.yaml data.store=5
    command line: data.store: ... give a file or folder
a word for a number = train config.yaml optimizer.steps=many
    command line: optimizer.steps: ... give a whole number
no step = train config.yaml optimizer.steps=0
    command line: optimizer.steps: ... give at least 1
a learning rate below zero = train config.yaml optimizer.peak_lr=-1
    command line: optimizer.peak_lr: ... give more than 0.0
a comma in a number = train config.yaml optimizer.peak_lr=0,001
    command line: optimizer.peak_lr: ... give a number
a seed below zero = train config.yaml run.seed=-1
    command line: run.seed: ... give at least 0
a seed too large = train config.yaml run.seed=99999999999999999999
    command line: run.seed: ... give less than 9223372036854775808
an octal number = train config.yaml run.seed=010
    run.seed=010: ... write 10 for decimal, or quote it
a device that is none = train config.yaml run.device=tpu
    command line: run.device: ... choose 'auto', 'cpu' or 'cuda'
no for a word = train config.yaml run.resume=no
    command line: run.resume: ... choose 'auto' or 'never'
a window that is no multiple = train config.yaml window.window_tokens=40
    command line: window.window_tokens: ... 32 would work
lanes that do not divide = train config.yaml distributed.devices=3
    config.yaml:13: window.lanes: ... 3 would work
passes that do not divide = train config.yaml window.lanes=4 window.lanes_per_pass=3
    command line: window.lanes_per_pass: ... try 1
a short segment for two = train config.yaml distributed.devices=2 distributed.time_ranks=2 window.segment_tokens=16
    command line: window.segment_tokens: 16 is not a multiple of 16 for each of 2 time_ranks; 32 would work
lanes that ranks cannot share = train config.yaml distributed.devices=4 window.lanes=2
    command line: window.lanes: 2 cannot be divided evenly among 4 ranks (devices * nodes / time_ranks); 4 would work
offloading that a strategy cannot do = train config.yaml distributed.offload_parameters=true distributed.strategy=zero2
    command line: distributed.offload_parameters: strategy zero2 ... zero3
time ranks that do not divide = train config.yaml distributed.devices=2 distributed.time_ranks=3
    command line: distributed.time_ranks: ... choose a divisor
a warm-up as long as the run = train config.yaml optimizer.warmup_steps=2
    command line: optimizer.warmup_steps: ... use fewer, or null for a tenth
a final rate of a constant = train config.yaml optimizer.schedule=constant optimizer.final_lr=0.1
    command line: optimizer.final_lr: ... leave it out
offload without ZeRO = train config.yaml distributed.devices=2 distributed.offload_optimizer=true
    command line: distributed.offload_optimizer: ... choose zero1, zero2 or zero3
small moments of several devices = train config.yaml distributed.devices=2 window.lanes=2 optimizer.states=int8
    command line: optimizer.states: int8 is for one device; on 2, distributed.strategy: zero2 divides memory
small moments of a state = tune tune.yaml optimizer.states=int8
    command line: optimizer.states: int8 is for weights that learn, and model.learn is initial_state; use fp32
small moments in ZeRO = train config.yaml optimizer.states=int8 distributed.strategy=zero1
    command line: optimizer.states: int8 has no place in distributed.strategy: zero1; use ddp
small moments on the host = train config.yaml optimizer.states=int8 distributed.offload_optimizer=true
    command line: optimizer.states: int8 does not go with distributed.offload_optimizer; use one of them
small weights in fp32 = train config.yaml optimizer.weights=bf16_stochastic
    command line: optimizer.weights: bf16_stochastic needs run.precision: bf16
small gradients of large weights = train config.yaml optimizer.gradients=bf16_stochastic run.precision=bf16
    command line: optimizer.gradients: bf16_stochastic needs optimizer.weights: bf16_stochastic
a model that nobody published = plan gose-2.9b --gpu 24
    gose-2.9b: is neither a published size nor a file that is here; did you mean goose-2.9b?
a proposal for no GPU = plan finch-3b --learn weights
    --learn: goes with --gpu, which proposes a configuration; add --gpu 24 or leave it out
settings of a proposal = plan finch-3b optimizer.steps=3 --gpu 24
    optimizer.steps=3: settings go with a configuration; change the proposed one instead
several problems = train config.yaml optimizer.steps=x run.seed=-1 window.lanes=0
    command line: 3 problems
    command line: window.lanes: 0 does not fit; give at least 1
    command line: optimizer.steps: 'x' does not fit; give a whole number
    command line: run.seed: -1 does not fit; give at least 0
sizes and weights = train config.yaml model.weights=finch.pth
    config.yaml:2: model.version: ... leave it out
a size that is not published = train tune.yaml model.size=finch-9b
    model.size: ... choose one of these:
    eagle-0.4b, eagle-1.5b, eagle-3b, eagle-7b
    finch-1.6b, finch-3b, finch-7b, finch-14b
    goose-0.1b, goose-0.4b, goose-1.5b, goose-2.9b, goose-7.2b, goose-13.3b
a size that the weights do not have = train tune.yaml model.size=finch-3b
    model.size: ... name the right one, or leave it out (model.size=null)
    finch-3b: Finch, 3,099,863,040 parameters, 32 layers of width 2560
    finch.pth: Finch, 44,736 parameters, 2 layers of width 32
half a width = train config.yaml model.width=40
    model.width: ... 48 would work
ranks of mixing in Eagle = train config.yaml model.version=5 model.mix_rank=3
    model.mix_rank: only version 6 has it; leave it out
tuning without weights = tune config.yaml
    config.yaml:1: model.learn: ... name it with model.weights
weights that learn in 4 bits = train config.yaml model.frozen_dtype=nf4
    command line: model.frozen_dtype: nf4 is for frozen weights, and learn: weights trains them; leave it out
training by tune = tune tune.yaml model.learn=weights
    command line: model.learn: ... `infctx tune` takes initial_state or adapter
an adapter that does not learn = train tune.yaml model.adapter.rank=8 model.learn=initial_state
    command line: model.adapter: ... set learn: adapter, or leave it out
a factor of miss = tune tune.yaml model.learn=adapter model.adapter.form=miss model.adapter.alpha=4
    command line: model.adapter.alpha: ... leave it out, or choose lora or dora
a lookup in another form = tune tune.yaml model.learn=adapter model.adapter.form=dora model.adapter.where=[all,emb]
    command line: model.adapter.where: ... leave it out, or choose lora
an adapter that is not there = generate finch.pth --adapter gone.safetensors
    gone.safetensors: ... name an adapter (.safetensors), or the folder of a run that learned one
weights as an adapter = generate finch.pth --adapter finch.pth
    finch.pth: is no adapter that says what it computes; keep adapter_config.json beside it
many nodes from one shell = train config.yaml window.lanes=4 distributed.nodes=2
    distributed.nodes: ... start this command on each of them, with torchrun or srun (docs/distributed.md):
    torchrun --nnodes 2 --nproc-per-node 1 ... -m infctx train config.yaml window.lanes=4 distributed.nodes=2
many nodes in tune = tune tune.yaml window.lanes=4 distributed.nodes=2 distributed.devices=2
    distributed.nodes: ... start this command on each of them, with torchrun or srun (docs/distributed.md):
    torchrun --nnodes 2 --nproc-per-node 2 ... distributed.nodes=2 distributed.devices=2
"""
