"""Names on the hub, and downloads that stopped: rows for the table of wrong_inputs.  The tests run in offline mode."""

NAMES = """
# Names on the hub.
half a download, plan = plan tune.yaml model.weights=HALF
    HALF: ... 3,199,845,663; get it again, or, if it is a file of your own, rename it
    hf download BlinkDL/rwkv-6-world NAME --local-dir models
half a download, train = train tune.yaml model.weights=HALF
    HALF: ... 3,199,845,663; get it again, or, if it is a file of your own, rename it
    hf download BlinkDL/rwkv-6-world NAME --local-dir models
half a download, evaluate = evaluate HALF books/held_out
    HALF: ... 3,199,845,663; get it again, or, if it is a file of your own, rename it
    hf download BlinkDL/rwkv-6-world NAME --local-dir models
half a download, generate = generate HALF
    HALF: ... 3,199,845,663; get it again, or, if it is a file of your own, rename it
    hf download BlinkDL/rwkv-6-world NAME --local-dir models
half a download, export = export HALF out.pth
    HALF: ... 3,199,845,663; get it again, or, if it is a file of your own, rename it
    hf download BlinkDL/rwkv-6-world NAME --local-dir models
plan of weights on the hub without a size = plan tune.yaml model.weights=some/finch:x.pth
    model.weights: some/finch:x.pth ... set model.size, such as finch-3b (docs/models.md)
RWKV-7a on the hub = generate BlinkDL/rwkv7-g1:rwkv7a-g1b-0.1b.pth
    BlinkDL/rwkv7-g1:rwkv7a-g1b-0.1b.pth: is RWKV-7a or 7b (DeepEmbed) by its name; ... docs/models.md
RWKV-7b on the hub, train = train tune.yaml model.weights=some/rwkv7b-1.5B-world
    some/rwkv7b-1.5B-world: is RWKV-7a or 7b (DeepEmbed) by its name; infctx reads the files in docs/models.md
a model on the hub, offline = generate some/finch:x.pth
    some/finch:x.pth: ... and HF_HUB_OFFLINE is set; unset it, or copy that cache here
a model on the hub, offline, train = train tune.yaml model.weights=some/finch:x.pth
    some/finch:x.pth: ... and HF_HUB_OFFLINE is set; unset it, or copy that cache here
a state on the hub, offline = generate finch.pth --state some/states@v2:chat.st
    some/states@v2:chat.st: ... and HF_HUB_OFFLINE is set; unset it, or copy that cache here
an export from the hub, offline = export some/finch out.pth
    some/finch: ... and HF_HUB_OFFLINE is set; unset it, or copy that cache here
a dataset without its owner = prepare hf:pg19 --output out
    hf:pg19: is no dataset on the hub; give hf:OWNER/DATASET, with both parts
a dataset, offline = prepare hf:some/books --output out
    some/books: ... and HF_HUB_OFFLINE is set; unset it, or copy that cache here
a split of files here = prepare texts --output out --split train
    --split: is for datasets on the hub, hf:OWNER/DATASET; leave it out
no documents at all = prepare texts --output out --limit 0
    argument --limit: 0 is not a whole number of at least 1
"""
