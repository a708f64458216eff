"""Wrong inputs at the command line, and the message that each must get: the table of tests/test_wrong_inputs.py.

A row is `what is wrong = words after infctx`, and below it, indented, the lines of the message, without what they all
begin with; `...` is any text.  The files that it names are those of `desk` there; HALF is a download that stopped short
under the published name NAME.
"""

from typing import NamedTuple

from wrong_names import NAMES
from wrong_settings import SETTINGS


class Row(NamedTuple):
    """A mistake, the command that makes it, and the lines of the message."""

    name: str
    command: str
    message: list[str]


def read_table(table):
    rows = []
    for line in filter(None, table.splitlines()):
        if line.startswith("    "):
            rows[-1].message.append(line.strip())
        elif not line.startswith("#"):
            name, _, command = line.partition(" =")
            rows.append(Row(name, command, []))
    return rows


TABLE = """
# The command itself.
no command =
    the following arguments are required: COMMAND
unknown command = frob
    frob: is no command; there are prepare, inspect, train, tune, plan and more; see infctx --help
a misspelled command = reprot run
    reprot: is no command; perhaps report is meant; see infctx --help
train without a configuration = train
    the following arguments are required: config
generate without a model = generate
    the following arguments are required: model
a misspelled flag = train config.yaml --rehersal
    --rehersal: infctx train has no such flag; perhaps --rehearse is meant; see infctx train --help
a flag of another command = train config.yaml --max-tokens 80
    --max-tokens: infctx train has no such flag; leave it out; see infctx train --help
a rehearsal for no memory = train config.yaml --rehearse --device-gb nan
    --device-gb: nan is not a GPU's memory; give it in GB, such as 80
memory of GPUs without a rehearsal = train config.yaml --device-gb 80
    --device-gb: is for --rehearse and for infctx plan; leave it out
an unknown flag of prepare = prepare texts --output out --held-uot 0.1
    --held-uot: infctx prepare has no such flag; perhaps --held-out is meant; see infctx prepare --help
a choice that is none = generate finch.pth --device gpu
    argument --device: invalid choice: 'gpu' (choose from ... cuda
a flag without its value = prepare texts --output
    argument --output: expected one argument
a benchmark of an unknown size = bench --size finch-5b
    bench --size finch-5b: there is no such size; docs/models.md lists them
a benchmark of sizes that make no model = bench --width 100
    bench: width: 100 is not a multiple of head_size 64; 128 would work
a benchmark against no commit = bench --against no-such-commit
    bench --against no-such-commit: git finds no such commit in ... use a clone, and name one of its commits
a table of a benchmark that is no Markdown = bench --output config.yaml
    config.yaml: the table is Markdown; name a file that ends in .md
# Configurations.
a configuration that is missing = train gone.yaml
    gone.yaml: ... the shipped configurations are in configs/
a folder as configuration = train books
    books: ... name a YAML file, such as configs/finch-tiny.yaml
an empty configuration = train empty.yaml
    empty.yaml: ... it needs model, data, window, optimizer, run, distributed
a list as configuration = train list.yaml
    list.yaml: ... it needs model, data, window, optimizer, run, distributed
a binary configuration = train finch.pth
    finch.pth: ... name a YAML file, or save this one as UTF-8
a PDF as configuration = train letter.pdf
    letter.pdf: ... name a YAML file, or save this one as UTF-8
a text as configuration = train README.md
    README.md: ... it needs model, data, window, optimizer, run, distributed
a UTF-16 configuration = train utf16.yaml
    utf16.yaml: ... name a YAML file, or save this one as UTF-8
zeros as configuration = train zeros.yaml
    zeros.yaml: ... name a file of settings
a tab in a configuration = train tab.yaml
    tab.yaml:2: ... indent with spaces
a setting twice = train twice.yaml
    twice.yaml:3: ... remove one of the two
a number as configuration = train 5
    5: ... the shipped configurations are in configs/
a configuration with a missing section = plan short.yaml
    short.yaml: 4 problems
    short.yaml: data: is missing; set it in the file or as an override
    short.yaml: window: is missing; set it in the file or as an override
    short.yaml: optimizer: is missing; set it in the file or as an override
    short.yaml: run: is missing; set it in the file or as an override
an empty section = train hollow.yaml
    hollow.yaml: 2 problems
    hollow.yaml:10: window: the section is empty; remove it, or put settings below it
    hollow.yaml:11: windows: unknown setting; did you mean window?
# What a run reads.
files that are missing = train tune.yaml model.weights=gone.pth data.store=gone
    this machine does not have everything the run needs
    model.weights: there is no gone.pth; ... name another file
    data.store: there is no gone.idx with its .bin; make it with `infctx prepare`
    or add --rehearse to try the same settings here on a small model
a store's folder = train config.yaml data.store=books
    books: ... name a store in it, without .bin and .idx: books/held_out or books/train
tokens beyond the vocabulary = train config.yaml data.store=beyond/train
    beyond/train.bin: ... prepare it with the model's tokenizer
held-out tokens beyond the vocabulary = train config.yaml data.held_out=beyond/train
    beyond/train: ... prepare the documents with the model's tokenizer
another tokenizer in train = train tune.yaml model.weights=world.pth
    books/held_out: ... prepare it with --tokenizer world, or name another model
another tokenizer in tune = tune tune.yaml model.weights=world.pth
    books/held_out: ... prepare it with --tokenizer world, or name another model
another tokenizer in evaluate = evaluate world.pth books/held_out
    books/held_out: ... prepare it with --tokenizer world, or name another model
World documents for bytes = train config.yaml data.store=world-books/train
    world-books/train: ... prepare it with --tokenizer bytes, or name another model
a text as weights = train tune.yaml model.weights=README.md
    README.md: ... name a weights file
a state as weights = train tune.yaml model.weights=finch-state.pth
    finch-state.pth: ... name the model, and give this file with --state or model.initial_state
weights as a state = tune tune.yaml model.initial_state=finch.pth
    finch.pth: ... name a state, such as the state.safetensors of a tuned run
a state of other sizes = tune tune.yaml model.initial_state=deeper-state.pth
    deeper-state.pth: ... use one tuned on this model
a damaged store = train config.yaml data.store=bad
    bad.idx: ... copy it again, or make it with `infctx prepare`
a training that fails = train config.yaml optimizer.peak_lr=1e38
    step 2: ... lower optimizer.peak_lr, or look at these documents
    the states before that segment had entries ... in size
    documents of the step: lane 0: 1; lane 1: 0
    there is no checkpoint yet
an export without a model = export gone.pth out.pth
    gone.pth: ... give a .pth or .safetensors of RWKV-5.2, 6 or 7
an Eagle under fla's names = export eagle.pth out.pth --names fla
    out.pth: ... choose one of official, huggingface
an output of evaluate that exists = evaluate finch.pth books/held_out --output README.md
    README.md: ... choose another name
# The run's folder.
a folder with other files = train config.yaml run.folder=configs
    run.folder: configs holds other files (eagle-tiny.yaml); choose another folder
a file as the run's folder = train config.yaml run.folder=README.md
    run.folder: README.md is a file; choose another folder
a folder of texts = train config.yaml run.folder=texts
    run.folder: ... choose another folder
a folder below a file = train config.yaml run.folder=README.md/run
    run.folder: ... choose another folder
other documents on resume = train config.yaml run.folder=run data.store=books/held_out
    data.store: ... put those back, or begin a new run
    a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER
other lanes on resume = train config.yaml run.folder=run window.lanes=4
    window.lanes: 2 when the checkpoint was saved, 4 now; set it back, or begin a new run
    a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER
shuffle on resume = train config.yaml run.folder=run data.shuffle=false
    data.shuffle: ... set it back, or begin a new run
    a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER
another seed on resume = train config.yaml run.folder=run run.seed=7
    run.seed: ... set it back, or begin a new run
    a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER
other sizes on resume = train config.yaml run.folder=run model.num_layers=3
    run/checkpoints/step-000002: ... set its sizes back, or choose another run.folder
    it holds Finch, 70,848 parameters, 2 layers of width 32
    the settings ask for Finch, 97,984 parameters, 3 layers of width 32
other pieces on resume = train config.yaml run.folder=run data.document_tokens=32
    data.document_tokens: ... set it back, or begin a new run
    a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER
never on resume = train config.yaml run.folder=run run.resume=never
    run/checkpoints: ... run.resume is never; choose another run.folder, or auto
tuning in a trained run = tune tune.yaml run.folder=run
    run/checkpoints/step-000002: ... another model.learn; choose another run.folder
other weights under a tuned state = tune tune.yaml run.folder=tuned model.weights=other.pth
    tuned/checkpoints/step-000002/state.safetensors: ... name those weights, or choose another run.folder
a run without checkpoints = train config.yaml run.folder=emptied
    emptied/model.pth: ... move it away, or choose another run.folder
a rehearsal's folder = train config.yaml --rehearse run.folder=used
    used-rehearsal: ... move it, or choose a run.folder
a rehearsal under torchrun = train config.yaml --rehearse
    --rehearse: ... run it by itself, without torchrun or srun
RWKV-7 in train = train tune.yaml model.weights=seven.pth
    seven.pth: ... RWKV-7a or 7b (DeepEmbed); infctx reads RWKV-5.2, RWKV-6 and RWKV-7
# Plan.
no memory = plan config.yaml --device-gb 0
    --device-gb: ... give it in GB, such as 80
words for memory = plan config.yaml --device-gb much
    argument --device-gb: much is not a number
plan of missing weights = plan tune.yaml model.weights=gone.pth
    model.weights: ... name another file, or set model.size
memory of a CPU = plan config.yaml --device-gb 80
    --device-gb: ... leave it out, or add run.device=cuda
# Models.
a model that is missing = generate gone.pth
    gone.pth: ... give a .pth or .safetensors of RWKV-5.2, 6 or 7
a text as model = generate README.md
    README.md: ... name a weights file
a cut model = generate cut.pth
    cut.pth: ... copy it again
an empty model = generate hollow.pth
    hollow.pth: ... copy it again, or name another
RWKV-7 = generate seven.pth
    seven.pth: ... RWKV-7a or 7b (DeepEmbed); infctx reads RWKV-5.2, RWKV-6 and RWKV-7
RWKV-4 = evaluate four.pth books/held_out
    four.pth: ... RWKV-4 or RWKV-5.0/5.1; infctx reads RWKV-5.2, RWKV-6 and RWKV-7
a state as model = generate finch-state.pth
    finch-state.pth: ... name the model, and give this file with --state or model.initial_state
a model as state = generate finch.pth --state finch.pth
    finch.pth: ... name a state, such as the state.safetensors of a tuned run
a state that is missing = generate finch.pth --state gone.pth
    gone.pth: ... name a state (.pth, .st, .state or .safetensors), or the folder of a tuned run
a state of a deeper model = generate finch.pth --state deeper-state.pth
    deeper-state.pth: ... use one tuned on this model
a folder without a model = generate books
    books: ... give a .pth, a .safetensors, a checkpoint or a run's folder
a tuned run without checkpoints = generate emptied-tuned
    emptied-tuned: ... give a .pth, a .safetensors, a checkpoint or a run's folder
more words than there are places for = generate finch.pth tokens
    tokens: ... leave them out; see infctx generate --help
# Evaluate and generate.
evaluate with swapped arguments = evaluate books/held_out run
    books/held_out: ... run infctx evaluate run books/held_out
a store's folder in evaluate = evaluate finch.pth books
    books: ... name a store in it, without .bin and .idx: books/held_out or books/train
a store that is missing = evaluate finch.pth gone/held_out
    gone/held_out: ... make one with `infctx prepare`
no tokens to evaluate = evaluate finch.pth books/held_out --max-tokens 0
    argument --max-tokens: 0 is not a whole number of at least 1
a report of a run that is missing = report gone
    gone: there is no such run; name a run's folder (run.folder)
a report of no run = report run books
    books: is no run: it has no steps.jsonl; name a run's folder (run.folder)
a report of a run without logs = report silent
    silent: the run has logged no step yet; train it first, or name another
a report of a run with damaged measurements = report hurt
    hurt/evaluation.json: ... measure again, or move it away
a report of a record that is cut off = report cut-run
    cut-run/held_out.json: ... measure again, or move it away
a report of a model = report finch.pth
    finch.pth: is no run; name a run's folder, or a file that infctx evaluate --output wrote
a report of a run, twice = report run ./run
    run: is named twice; name each run once
a report over another file = report run --output page.html
    page.html: exists, and is no report that infctx wrote; choose another name
a report into a folder = report run --output books.html/../books
    --output: ... give it a name that ends in .html
a report that would be a picture = report run --output report.png
    --output: report.png is no page; give it a name that ends in .html
a report below a file = report run --output README.md/report.html
    README.md: ... choose another place
a report that joins one seed = report run --join-seeds
    --join-seeds: no two of these runs differ in run.seed alone; leave it out
a comparison of one run = compare run
    the following arguments are required: RUN
segments of words = evaluate finch.pth books/held_out --segment-tokens many
    argument --segment-tokens: many is not a whole number of at least 1
models of different vocabularies = evaluate finch.pth odd.pth books/held_out
    odd.pth: has 100 ids, and finch.pth has 257; compare models of one vocabulary
an adapter for several models = evaluate finch.pth other.pth books/held_out --adapter run
    --adapter: is for one model; ... evaluate each
a measure that is none = evaluate finch.pth books/held_out --what positions,speed
    argument --what: speed: take positions, reach, forgetting, recall, needle or states
a length that is none = evaluate finch.pth books/held_out --lengths 1k,many
    argument --lengths: many is not a whole number of at least 1, such as 4096 or 4k
a store shorter than a prompt = evaluate finch.pth books/held_out --what needle --lengths 4k
    books/held_out: has ... and a prompt of needle takes 4,096; give a longer store, or shorter --lengths
a store shorter than a curve = evaluate finch.pth books/held_out --what forgetting --lengths 1k
    books/held_out: has ... and forgetting at 1,024 takes 3,072; give a longer store, or shorter --lengths
a prompt without room = evaluate finch.pth books/held_out --what needle --lengths 50
    --lengths: a prompt of 50 tokens is too short for needle; give ... or more
needles without words = evaluate odd.pth beyond/train --what needle
    --what needle: ... the model's 100 ids; leave needle out
a gap without room = evaluate finch.pth books/held_out --what recall --lengths 1
    --lengths: a gap of 1 tokens has no room for a question; give 2 or more
documents beyond the vocabulary = evaluate finch.pth beyond/train
    beyond/train: ... prepare the documents with the model's tokenizer
tokens below zero = generate finch.pth --tokens -5
    argument --tokens: -5 is not a whole number of at least 1
a temperature below zero = generate finch.pth --temperature -1
    temperature: -1.0 ... give 0 or more
no top-p = generate finch.pth --top-p 0
    top_p: 0.0 ... give more than 0, and 1 at most
a seed out of range = generate finch.pth --seed 18446744073709551616
    argument --seed: 18446744073709551616 is not a whole number from 0 to 2^63 - 1
a prompt that is not UTF-8 = generate finch.pth --prompt caf\udce9
    --prompt: ... give it as UTF-8
a vocabulary without a tokenizer = generate odd.pth
    generate: ... 100 ids; take a model of 257 (bytes) or 65,536 (World)
# Export.
an output that exists = export finch.pth deeper.pth
    deeper.pth: ... choose another name, or give --overwrite
an unknown suffix = export finch.pth out.gguf
    out.gguf: ... choose one of these suffixes
an output without a suffix = export finch.pth out
    out: ... choose one of these suffixes
names that do not fit = export finch.pth hf/ --names huggingface
    hf: ... export a file, such as hf.safetensors
names for a state = export tuned out.pth --names fla --form pth
    export: fla names ... give --form weights to export the weights
a state with the weights' form = export finch-state.pth out.pth --form weights
    finch-state.pth: ... name the model, and give this file with --state
a state from a model = export finch.pth out.st
    finch.pth: ... tune one with `infctx tune`
a merged file without a state = export finch.pth out.pth --form merged
    finch.pth: ... give a state file with --state
a state of other sizes in export = export finch.pth out.pth --state deeper-state.pth
    deeper-state.pth: ... use one tuned on this model
a dtype of an st = export tuned out.st --dtype bf16
    export: a state of form st ... leave --dtype out
a suffix of another form = export tuned out.pth --form st
    out.pth: ... rename it
a folder as output = export finch.pth books
    books: ... choose another name, or give --overwrite
# Prepare.
a text that is missing = prepare gone.txt --output out
    gone.txt: ... check the path
a pattern without files = prepare 'gone/*.txt' --output out
    gone/*.txt: ... check it, and put it in quotes
an empty text = prepare empty.txt --output out
    empty.txt: ... name a file with text in it
a text in Latin-1 = prepare latin.txt --output out
    latin.txt: ... convert it, add its --encoding, such as cp1252, or --skip-bad
a broken line of JSON = prepare broken.jsonl --output out
    broken.jsonl:2: ... correct the line, or add --skip-bad
JSON without text = prepare other.jsonl --output out
    other.jsonl:1: ... give the document's text this key, or name another with --text-column
a cut gzip = prepare cut.txt.gz --output out
    cut.txt.gz: ... copy or compress it again
a picture = prepare image.png --output out
    image.png: ... convert it to UTF-8 text first
a PDF = prepare letter.pdf --output out
    letter.pdf: ... convert it to UTF-8 text first
a folder of stores = prepare books --output out
    books: ... name one, such as books/held_out
an empty folder = prepare empty --output out
    empty: ... check the path
standard input without a format = prepare - --output out
    standard input has no suffix that gives its format; add --format text or --format jsonl
a share of 0.7 = prepare texts --output out --held-out 0.7
    --held-out: ... give 0 to 0.5 of the documents, such as 0.05
a share of 0.4 = prepare texts --output out --held-out 0.4
    --held-out: ... give a share such as 0.5 or 0.333
an encoding that is none = prepare texts --output out --encoding utf9
    --encoding: ... give one such as cp1252, latin-1, utf-16-le, gb18030
no workers = prepare texts --output out --workers 0
    argument --workers: 0 is not a whole number of at least 1
a tokenizer that is none = prepare texts --output out --tokenizer gpt2
    argument --tokenizer: invalid choice: 'gpt2' (choose from ... bytes
an output folder with other files = prepare texts --output configs --overwrite
    configs: ... choose another output folder
an output that is there = prepare texts --output books
    books: ... choose another output folder, or add --overwrite
an output that is a file = prepare texts --output README.md
    README.md: ... name a folder for the token stores
a seed of words = prepare texts --output out --seed x
    argument --seed: x is not a whole number from 0 to 2^63 - 1
"""

ROWS = read_table(SETTINGS + TABLE + NAMES)
