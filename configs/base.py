"""Every setting of a run, once, with its unit and meaning. Recipes beside this file change some of them.

Durations are strings in the unit that suits: "700 steps", "3e6 tokens" or "2 epochs" of the training split.
"""

from ml_collections import ConfigDict

from posenc_jax import encodings
from posenc_jax.schema import ConfigError


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "base"  # names the run's folder and its rows in tables
    config.seed = 0  # of the initial weights, the order of the data and dropout

    config.data = data = ConfigDict()
    data.corpus = "stdlib"  # stdlib (source text of Python's own library) | enwik8 | text8 | wikitext103
    data.path = ""  # a file of UTF-8 text, or a folder of *.txt files, in place of a corpus
    data.cache_dir = ""  # downloads, tokens, compiled programs; "": $XDG_CACHE_HOME/posenc_jax or ~/.cache/posenc_jax
    data.validation_files = ()  # patterns of the document names held out; (): by a hash of the name
    data.test_files = ()
    data.validation_fraction = 0.05  # of the documents, or of a single file from its end
    data.test_fraction = 0.05
    data.tokenizer = "bytes"  # bytes | bpe | wordpiece (both over bytes, trained on the training split)
    data.vocab_size = 256  # tokens; 256 for bytes

    config.model = model = ConfigDict()
    model.architecture = "transformer"  # transformer | rnn | lstm | gru | elmo; see recurrent() below for the others
    model.num_layers = 4
    model.causal = True  # predict the next token; False: see all others, and predict tokens that are hidden (BERT)
    model.pattern = "E"  # layer by layer, repeated: E with the encoding, N without ("EEEN": every fourth without)
    model.window = 0  # last tokens that layers with the encoding see; 0: all
    model.d_model = 128  # width of the residual stream, or of a recurrent state
    model.num_heads = 2  # query heads
    model.num_kv_heads = 2  # key and value heads; fewer than num_heads is grouped-query attention
    model.head_dim = 64  # width of one head
    model.d_ff = 384  # hidden width of the feed-forward block
    model.activation = "swiglu"  # swiglu (three matrices) | gelu (two)
    model.qk_norm = False  # RMS-normalise queries and keys per head, before the encoding rotates them
    model.norm = "rms"  # rms (RMSNorm) | layer (layer norm)
    model.post_norm = False  # normalise after each residual sum, as the first transformers did, not before each branch
    model.use_bias = False  # constants in attention and feed-forward layers
    model.tied_embeddings = True  # the output layer is the token embedding, transposed
    model.dropout = 0.0  # probability, on the embedding and on each residual branch
    model.dtype = "float32"  # of activations: float32 | bfloat16; parameters and angles are float32
    model.remat = False  # recompute each layer in the backward pass, to save memory

    config.encoding = encoding("rope")

    config.positions = positions = ConfigDict()
    positions.training = "contiguous"  # contiguous | offset | randomized | random_float; see posenc_jax/positions.py
    positions.range = 2048  # positions that the random schedules draw from, and `even` spans
    positions.per_layer = False  # draw anew for each layer
    positions.evaluation = "contiguous"  # contiguous | drawn (as in training) | even | interpolated

    config.temperature = temperature = ConfigDict()
    temperature.form = "none"  # none | ssmax (learned, times the logarithm of the keys seen) | llama4
    temperature.scale = 0.1  # of the logarithm, in llama4
    temperature.floor = 8192  # tokens per step of llama4's temperature
    temperature.layers = "EN"  # on layers with the encoding (E), without (N), or both (EN)

    config.training = training = ConfigDict()
    training.length = 256  # tokens of context
    # Tokens of context in the first training of a model that is trained further. Scaling rules, constants of encodings,
    # context_gain and reports refer to it. 0: training.length. Studies set it for runs that continue others.
    training.pretrained_length = 0
    training.batch_size = 16  # windows per step, over all devices
    training.grad_accum_steps = 1  # parts a batch is processed in, one after another, to save memory
    training.cpu_devices = 2  # devices that a CPU counts as, at most one per core: they share each batch
    training.mask_ratio = 0.15  # of the tokens, where the model is not causal
    training.drope = "0 steps"  # the last part of training, from which on no layer has the encoding
    training.duration = "500 steps"
    training.warmup = "50 steps"  # of linear warm-up, before the cosine decay
    training.log_every = "20 steps"
    training.validate_every = "100 steps"
    training.checkpoint_every = "100 steps"
    training.keep_last = 2  # checkpoints kept, at least 2: if one is damaged, the one before it is used
    # A run that has decayed its learning rate may go on with another duration only if this is True: the learning rate
    # then jumps to that of the new schedule. config.json and the report say so.
    training.allow_schedule_change = False
    training.steps_per_dispatch = 5  # steps that a call takes, at most, and up to the next log; a signal waits for two
    training.profile = "0 steps"  # traced by the profiler, into WORKDIR/profile, after the first 5

    # Over devices; what these leave of them divides the batch further.
    config.sharding = sharding = ConfigDict()
    sharding.fsdp = 1  # devices that share kernels and their moments by width, and still have rows of their own
    sharding.tensor = 1  # devices that share heads, hidden width and vocabulary, and work on the same rows
    # Of a study: parts of the devices, each with runs of its own of those that are trained together. By default (0) as
    # many as make the fewest rounds; and on GPUs and TPUs, unless a model is divided, runs are trained together.
    sharding.parallel_runs = 0

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 2e-3  # AdamW's, at the end of the warm-up
    optimizer.end_lr_ratio = 0.1  # of it, at the end of the cosine
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1  # times the learning rate, per step
    optimizer.weight_decay_mask = r".*kernel"  # regular expression over parameter paths: what weight decay applies to
    optimizer.grad_clip_norm = 1.0  # global norm to which gradients are clipped

    config.evaluation = evaluation = ConfigDict()
    evaluation.lengths = (128, 256, 512, 1024, 2048)  # tokens, increasing
    evaluation.windows = 64  # windows of the longest length, the same for every model
    evaluation.tail = 64  # last positions before a length, over which tail and context_gain are measured
    evaluation.copy_distances = ()  # tokens from a chunk of text to its second showing, which is found again or not
    evaluation.copy_chunk = 32  # tokens of that chunk
    evaluation.rope_scalings = ("none",)  # RoPE scaling rules applied to the trained weights
    evaluation.batch_tokens = 16384  # scored at a time; bounds memory
    evaluation.validation_windows = 64  # of the training length, scored during training
    evaluation.resamples = 1000  # of the bootstrap behind each interval
    return config


def encoding(name: str) -> ConfigDict:
    """The section of one encoding: its name and its own hyper-parameters at their defaults."""
    return ConfigDict({"name": name, **encodings.default_config(name)})


def recurrent(cell: str, transformer: ConfigDict) -> ConfigDict:
    """The section of a recurrent model ("rnn", "lstm", "gru", "elmo"), with fields of a transformer's that it has."""
    shared = ("num_layers", "d_model", "tied_embeddings", "dropout", "dtype", "remat")
    return ConfigDict({"architecture": cell, **{name: transformer[name] for name in shared}})


def options(argument: str, **allowed: tuple[str, ...]) -> dict[str, str]:
    """Read the part of `--config=FILE.py:size=small,encoding=alibi` after the colon; the first value is the default."""
    chosen: dict[str, str] = {}
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
