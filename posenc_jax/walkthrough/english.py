"""All that the walkthrough says, in English. Names in braces are filled in from the trace by `story` and `pictures`."""

ENGLISH = {
    "title": "How a transformer is told the order of “{sentence}”",
    "intro": "This page follows one sentence through the two usual ways of telling a transformer where its tokens "
    "stand: adding a positional embedding to the token embeddings, and rotating queries and keys (RoPE). Every "
    "number was computed for this sentence. The weights are random (seed {seed}), as in a model before training: "
    "nothing here is trained, so a single value means nothing, while the shapes, and all that is said of them, hold "
    "for any weights.",
    "pipeline.caption": "The same tokens on both ways, with shapes. Colour marks where positions enter.",
    "slip.heading": "Often told wrong",
    "slip.truth": "In fact",
    "head": "head {number}",
    "position": "position",
    "token": "token",
    "footer": "Made by",
    # 1
    "tokens.title": "1. Tokens",
    "tokens.wordpiece": "WordPiece cuts the sentence into tokens (here {T}); ## marks a piece that continues a word. "
    "The vocabulary was learned from the sentence itself and, where one is given, from a corpus, so an id is a "
    "place in this vocabulary, not in that of a published model.",
    "tokens.given": "The tokens (here {T}) were given. They are numbered as each is first seen: the vocabulary of a "
    "published model would have other ids for them, and so other rows.",
    "tokens.bytes": "The tokens (here {T}) are the bytes of the sentence in UTF-8; each byte is its own id.",
    "tokens.id": "id",
    # 2
    "embedding.title": "2. One-hot times the embedding matrix",
    "embedding.text": "Each token becomes a row of {V} numbers: 1 in the column of its id, 0 in all others. Times "
    "the embedding matrix W, this picks one row of W for each token, which is why programs look the row up and "
    "never multiply. Here both were done, and they agree exactly. Nothing in the result says where a token stands: "
    "the same token gets the same row at any position.",
    "embedding.shapes": "one-hot {TV} @ W {VD} = {TD}",
    "embedding.scale": "W is drawn with standard deviation 1/√{D}. Its rows are multiplied by √{D} = {root} as they "
    "enter the model, which makes their standard deviation 1. The first columns of the result:",
    # 3
    "positional.title": "3. The positional embedding",
    "positional.sinusoidal": "A matrix of the same shape that knows positions m and no tokens. Each pair of columns, "
    "2i and 2i+1, holds the sine and the cosine of one angle, the position times θᵢ:",
    "positional.sinusoidal.shapes": "θᵢ = 10000^(-2i/{D})\nPE(m, 2i) = sin(m θᵢ)\nPE(m, 2i+1) = cos(m θᵢ)\nPE: {TD}",
    "positional.learned": "Here it is a table with one learned row for each of {length} positions, as in BERT and "
    "GPT-2; before training, its rows are random. Position {length} has no row: such a model cannot read further.",
    "positional.learned.shapes": "table[0 .. {last}] of ({length}, {D}): {TD}",
    "slip.zero": "“The first token is at position 0, so its positional embedding is zero.”",
    "slip.zero.truth": "Only the sines are: PE(0, 2i) = sin 0 = 0, but PE(0, 2i+1) = cos 0 = 1. Row 0 of the "
    "sinusoidal matrix begins {row}, and has the same length as every other row, √({D}/2) = {norm}.",
    "sinusoidal.caption": "Left, the sinusoidal matrix: columns on the left turn fast, those on the right hardly at "
    "all. Right, the product of the rows of two positions: from whichever position one starts, it depends on the "
    "distance alone, and it is the same in both directions.",
    "wavelengths.caption": "The Fourier view. Left, some pairs of the sinusoidal matrix as waves over positions "
    "(their sines). Right, the wavelength 2π/θᵢ of each pair, from 6.28 tokens to {longest} in PE; RoPE spreads the "
    "same range over the {half} pairs of a head.",
    # 4
    "sum.title": "4. Their sum",
    "sum.text": "The two matrices are added element by element, once, before the first layer. From here on token and "
    "position share the same {D} channels, and the layers have to tell them apart.",
    "sum.shapes": "{TD} + {TD} = {TD}",
    "sum.caption": "The first {columns} columns of the token embeddings, of the positional embedding and of their sum.",
    "slip.sum": "“With positions added, attention sees how far apart two tokens are.”",
    "slip.sum.truth": "It sees where each of them stands, and may learn to compare; the product itself does not. The "
    "query of “{first}” at position {q1} and the key of “{final}” at position {k1} give {a} in head 1; the same two "
    "tokens, as far apart, at positions {q2} and {k2} give {b}.",
    "slip.sum.beyond": "It sees where each of them stands, and may learn to compare. At positions {q2} and {k2} the "
    "same two tokens cannot even be read: the learned table ends at position {end}.",
    # 5
    "project.title": "5. RoPE: queries and keys",
    "project.text": "RoPE adds nothing: the embeddings of step 2 enter the first layer as they are. In every "
    "attention layer they are projected to queries and keys, which are cut into {H} heads of {d} channels each:",
    "project.shapes": "q = x W_q: {TD} @ {DD} = {TD} -> {THd}\nk = x W_k: {TD} @ {DD} = {TD} -> {THd}",
    "slip.place": "“RoPE rotates the token embeddings.”",
    "slip.place.truth": "It rotates q and k, after their projection, inside every attention layer. Values are not "
    "rotated, and the embeddings pass unchanged, to the last bit. Had the embeddings been rotated before the "
    "projection, the product of step 7 would be {a} at positions {q1} and {k1} but {b} at {q2} and {k2} (head 1): "
    "it would no longer depend on the distance alone.",
    # 6
    "rotate.title": "6. Rotation: each token by its own position",
    "rotate.text": "The {d} channels of a head form {half} pairs. Pair i of a token at position m is a point (a, b) "
    "of a plane, and is turned by the angle m θᵢ:",
    "rotate.angles": "Some of the pairs, with angles in radians and wavelengths in tokens. The last column is k's "
    "angle less q's, the same both times:",
    "rotate.shapes": "θᵢ = 10000^(-2i/{d})\n(a, b) -> (a cos mθᵢ - b sin mθᵢ, a sin mθᵢ + b cos mθᵢ)",
    "rotate.pair": "pair i",
    "rotate.theta": "θᵢ",
    "rotate.wavelength": "wavelength",
    "rotate.angle": "{name} at {position}",
    "rotate.between": "k - q",
    "slip.theta": "“The token at position m is rotated by the angle m.”",
    "slip.theta.truth": "The angle is the position times θᵢ, another one for each pair: at position {k2}, pair 0 "
    "turns by {fast} radians and pair {slowest} by {slow}. Were the position itself the angle, all pairs would turn "
    "alike and come round after 2π = 6.28 tokens: positions 0 and 44 would differ by {wrong} radians, and be all "
    "but the same.",
    "rotate.vectors": "The first channels of the two vectors that step 7 compares, in head 1, as projected and "
    "turned. At position 0 every angle is 0, so q is not changed there:",
    "rotate.before": "{name}",
    "rotation.caption": "Three planes of head 1, all arrows drawn with length 1. Solid: q of “{first}” at position "
    "{q1} and k of “{final}” at {k1}. Dashed: the same two at {q2} and {k2}. Every arrow has moved; the angle "
    "between q and k, drawn as an arc, has not.",
    "animation.caption": "The same, moving: q at position m and k {last} further, both turning, each plane at its "
    "own rate. The angle between the two stays, and with it the product.",
    # 7
    "product.title": "7. The dot product",
    "product.text": "Attention compares a query with a key by their dot product, which is then divided by √{d}. The "
    "query of the first token, “{first}”, meets the key of the last, “{final}”: not turned; turned by RoPE for "
    "positions {q1} and {k1}; with both moved by {shift}, to {q2} and {k2}; and, instead, with the positional "
    "embedding added at the same places:",
    "product.shapes": "(R_m q) · (R_n k) = q · (R_(n-m) k)",
    "product.plain": "q · k",
    "product.rope": "RoPE {q}, {k}",
    "product.added": "added {q}, {k}",
    "slip.relative": "“RoPE rotates tokens by their relative distance.”",
    "slip.relative.truth": "When a token is rotated, no other is in sight. “{first}” is turned by its own position, "
    "first {q1} and then {q2}; “{final}” by {k1} and then {k2}; and both vectors change (a channel of q by up to "
    "{dq}, of k by up to {dk}). The difference of positions appears in their product, which stays: over all heads, "
    "the two products differ by {worst} at most, which is rounding in float32.",
    "products.caption": "The same two tokens at two pairs of positions, equally far apart. Under RoPE both give the "
    "same product in every head. With a positional embedding added, they do not.",
    # 8
    "decay.title": "8. Over longer distances",
    "decay.text": "For a query and a key that are equal, RoPE's product is a mean of cosines, one for each pair: 1 "
    "at distance 0, and less, by and large, further away. The larger the base, the slower the fall. This long-term "
    "decay is a tendency of that special case, not a law: the curves ripple and rise again, and other q and k have "
    "other curves.",
    "decay.caption": "Left, q · k of equal vectors of length 1 in {d} channels, over their distance, for several "
    "bases; thick lines are means over stretches of distances. Right, what the paper (Su et al. 2021, §3.4.3) shows "
    "to decay: a bound on the product for any q and k, relative to its value at distance 0.",
    # 9
    "biases.title": "9. What others add to the logits",
    "biases.text": "Other encodings leave embeddings, queries and keys alone, and add a number to the logit of each "
    "query and key.",
    "biases.caption": "Head 1 of each over {span} positions. ALiBi: a straight line in the distance. T5: one learned "
    "number for each bucket of distances, wider further away. FIRE: a learned function of the distance relative to "
    "the position. FoX: the logarithms of gates, summed from the key to the query; the gates look at the tokens "
    "(this sentence, repeated), so the same distance costs more in one place than in another. T5, FIRE and FoX are "
    "shown as they are before training; each panel has its own scale of colours.",
    # labels in pictures
    "label.column": "column",
    "label.distance": "distance (tokens)",
    "label.dot": "dot product of two rows",
    "label.from": "from position {position}",
    "label.wave": "sine, one row per pair",
    "label.pair": "pair i",
    "label.wavelength": "wavelength (tokens)",
    "label.embeddings": "token embeddings",
    "label.positional": "positional embedding",
    "label.sum": "sum",
    "label.plane": "pair {pair}: θ = {theta} per token",
    "label.at": "{name} at {position}",
    "label.between": "angle between: {angle} rad",
    "label.product": "q · k",
    "label.rope": "RoPE",
    "label.added": "positions added",
    "label.bothat": "at {q} and {k}",
    "label.heads": "head",
    "label.base": "base {base}",
    "label.decay": "q · k of equal vectors",
    "label.bound": "bound on q · k (relative)",
    "label.query": "query position",
    "label.key": "key position",
    # the diagram
    "box.left": "Positional embedding: added once",
    "box.right": "RoPE: rotated in every layer",
    "box.tokens": "{T} tokens",
    "box.lookup": "one-hot {TV} @ W {VD}",
    "box.embedded": "token embeddings {TD}",
    "box.add": "+ positional embedding {TD}",
    "box.nothing": "nothing is added",
    "box.layer": "in every attention layer",
    "box.project": "q = x W_q, k = x W_k, v = x W_v {THd}",
    "box.noturn": "q and k stay as they are",
    "box.turn": "q of token m turned by m θᵢ, k of token n by n θᵢ",
    "box.attend": "softmax(q · k / √{d}) · v",
    "box.leftresult": "q · k depends on m and on n",
    "box.rightresult": "q · k depends on m and n by m - n only",
}
