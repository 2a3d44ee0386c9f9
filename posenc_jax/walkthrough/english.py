"""The English text of the walkthrough. `story` and `pictures` fill in the names in braces from the trace."""

ENGLISH = {
    "title": "How a transformer knows the token order of “{sentence}”",
    "intro": "This page follows one sentence through the two most common ways to tell a transformer the positions of "
    "its tokens: adding a positional embedding to the token embeddings, and rotating queries and keys (RoPE). All "
    "numbers were computed for this sentence. The weights are random (seed {seed}), as in a model before training. "
    "A single value therefore has no meaning, but the shapes, and the statements about them, hold for any weights.",
    "intro.trained": "Step 11 shows what {model} has learned.",
    "pipeline.caption": "The same tokens on both paths, with shapes. Colour marks the step where positions enter.",
    "slip.heading": "Common misconception",
    "slip.truth": "In fact",
    "position": "position",
    "token": "token",
    "footer": "Made by",
    # 1
    "tokens.title": "1. Tokens",
    "tokens.wordpiece": "WordPiece splits the sentence into tokens (here {T}). ## marks a piece that continues a word. "
    "The vocabulary was learned from the sentence itself and, if given, from a corpus. An id is therefore an index "
    "into this vocabulary, not into that of a published model.",
    "tokens.given": "The tokens (here {T}) were given. Their ids follow the order of first occurrence. The vocabulary "
    "of a published model has other ids for them, and so selects other rows.",
    "tokens.bytes": "The tokens (here {T}) are the bytes of the sentence in UTF-8. The id of a byte is its value.",
    "tokens.model": "The tokenizer of {model} splits the sentence into tokens (here {T}). ▁ is a space. Bytes that are "
    "no complete character are shown in hexadecimal. The ids are those of the model.",
    # 2
    "embedding.title": "2. One-hot times the embedding matrix",
    "embedding.text": "Each token becomes a row of {V:,} numbers: 1 in the column of its id, and 0 in all others. "
    "Multiplying it by the embedding matrix W selects one row of W for each token. Real programs therefore look up "
    "the row and do not multiply. Here both were computed, and they agree exactly. The result does not depend on the "
    "position of a token: the same token gets the same row at every position.",
    "embedding.shapes": "one-hot {TV} @ W {VD} = {TD}",
    "embedding.scale": "W is drawn with standard deviation 1/√{D}. When its rows enter the model, they are multiplied "
    "by √{D} = {root}, so that their standard deviation is 1. The first columns of the result:",
    # 3
    "positional.title": "3. The positional embedding",
    "positional.sinusoidal": "This matrix has the same shape, and depends on the positions m but not on the tokens. "
    "Columns 2i and 2i+1 form a pair: the sine and the cosine of one angle, the position times θᵢ:",
    "positional.learned": "Here it is a table with one learned row for each of {length:,} positions, as in BERT and "
    "GPT-2. Before training, its rows are random. Position {length:,} has no row, so such a model cannot read further.",
    "positional.learned.shapes": "table[0 .. {last}] of ({length}, {D}): {TD}",
    "slip.zero": "“The first token is at position 0, so its positional embedding is zero.”",
    "slip.zero.truth": "Only the sines are zero: PE(0, 2i) = sin 0 = 0, but PE(0, 2i+1) = cos 0 = 1. Row 0 of the "
    "sinusoidal matrix begins with {row}. As a vector, it has the same length as every other row, √({D}/2) = {norm}.",
    "sinusoidal.caption": "Left: the sinusoidal matrix. Its left columns oscillate fast, and its right columns hardly "
    "change. Right: the dot product of the rows of two positions. It depends only on their distance, for every "
    "starting position, and is the same in both directions.",
    "wavelengths.caption": "The Fourier view. Left: some pairs of the sinusoidal matrix as waves over positions "
    "(their sines). Right: the wavelength 2π/θᵢ of each pair, from 6.28 tokens to {longest} in PE. RoPE covers about "
    "the same range with the {half} pairs of a head.",
    # 4
    "sum.title": "4. Their sum",
    "sum.text": "The two matrices are added element by element, once, before the first layer. From here on, token and "
    "position share the same {D:,} channels, and the layers have to separate them.",
    "sum.caption": "The first {columns} columns of the token embeddings, of the positional embedding and of their sum.",
    "slip.sum": "“With positions added, attention sees how far apart two tokens are.”",
    "slip.sum.truth": "It sees the position of each token, and can learn to compare them. The dot product itself does "
    "not depend on the distance alone. The query of “{first}” at position {q1} and the key of “{final}” at position "
    "{k1} give {a} in head 1. The same two tokens at the same distance, at positions {q2} and {k2}, give {b}.",
    "slip.sum.beyond": "It sees the position of each token, and can learn to compare them. At positions {q2} and {k2} "
    "the model cannot even read the same two tokens, because the learned table ends at position {end:,}.",
    # 5
    "project.title": "5. RoPE: queries and keys",
    "project.text": "RoPE adds nothing: the embeddings of step 2 enter the first layer unchanged. Every attention "
    "layer projects its input to queries and keys, and splits them into {H} heads of {d} channels each:",
    "slip.place": "“RoPE rotates the token embeddings.”",
    "slip.place.truth": "It rotates q and k, after their projection, inside every attention layer. Values are not "
    "rotated, and the embeddings stay the same to the last bit. If the embeddings were rotated before the projection, "
    "the dot product of step 7 would be {a} at positions {q1} and {k1}, but {b} at {q2} and {k2} (head 1). It would "
    "no longer depend on the distance alone.",
    # 6
    "rotate.title": "6. Rotation: each token by its own position",
    "rotate.text": "The {d} channels of a head form {half} pairs. Pair i of a token at position m is a point (a, b) "
    "in a plane, and is rotated by the angle m θᵢ:",
    "rotate.angles": "Some of the pairs, with angles in radians and wavelengths in tokens. The last column is the "
    "angle of k minus the angle of q, which is the same at both pairs of positions:",
    "rotate.pair": "pair i",
    "rotate.wavelength": "wavelength",
    "rotate.angle": "{name} at {position}",
    "slip.theta": "“The token at position m is rotated by the angle m.”",
    "slip.theta.truth": "The angle is the position times θᵢ, which differs between pairs: at position {k2}, pair 0 "
    "rotates by {fast} radians and pair {slowest} by {slow}. If the angle were the position itself, all pairs would "
    "rotate at the same rate and return to the start after 2π = 6.28 tokens. Positions 0 and 44 would then differ by "
    "only {wrong} radians, and would be almost the same.",
    "rotate.vectors": "The first channels in head 1 of the two vectors that step 7 compares, before and after the "
    "rotation. At position 0 every angle is 0, so q does not change there:",
    "rotation.caption": "Three planes of head 1. All arrows are drawn with length 1. Solid: q of “{first}” at position "
    "{q1} and k of “{final}” at {k1}. Dashed: the same two at {q2} and {k2}. Every arrow has moved, but the angle "
    "between q and k, drawn as an arc, is the same.",
    "animation.caption": "The same as an animation: q is at position m and k is {last} tokens further. Both rotate, "
    "in each plane at its own rate. The angle between them stays the same, and so does the dot product.",
    # 7
    "product.title": "7. The dot product",
    "product.text": "Attention compares a query with a key by their dot product, which is then divided by √{d}. The "
    "table shows the dot product of the query of the first token, “{first}”, and the key of the last token, "
    "“{final}”: without rotation; rotated by RoPE for positions {q1} and {k1}; rotated after both are moved by "
    "{shift} tokens, to {q2} and {k2}; and with the positional embedding added at the same positions instead:",
    "product.added": "added {q}, {k}",
    "slip.relative": "“RoPE rotates tokens by their relative distance.”",
    "slip.relative.truth": "The rotation of a token depends on no other token. “{first}” is rotated by its own "
    "position, first {q1} and then {q2}. “{final}” is rotated by {k1} and then by {k2}. Both vectors change: a "
    "channel of q by up to {dq}, and of k by up to {dk}. Only their dot product depends on the difference of "
    "positions, so it stays the same: over all heads, the two products differ by at most {worst}, which is float32 "
    "rounding.",
    "products.caption": "The same two tokens at two pairs of positions with the same distance. With RoPE, both pairs "
    "give the same dot product in every head. With a positional embedding added, they do not.",
    # 8
    "attend.title": "8. Softmax and the output",
    "attend.text": "A query is compared with every key that it may see. In a decoder these are its own key and the "
    "earlier ones, so the last token, “{final}”, sees all. The logits of a query are its dot products divided by √{d}. "
    "Softmax turns them into weights: positive numbers whose sum is 1. The output of the head is the sum of the values "
    "v, each times its weight. The table shows the logits of the last token with RoPE, and its weights in the four "
    "cases of step 7, for head 1:",
    "attend.logit": "q · k / √{d}",
    "attend.output": "The first channels of the output:",
    "attend.end": "With RoPE, the output is the same at both places: no channel differs by more than {same}. With "
    "positions added it differs, because weights and values both contain the positions. The outputs of all heads are "
    "put side by side and multiplied by a matrix W_o. The result is added to the input of the layer. The feed-forward "
    "block and the next layer follow. After the last layer, one more matrix gives a logit to each token of the "
    "vocabulary, and their softmax is the probability of that token to come next.",
    # 9
    "decay.title": "9. Over longer distances",
    "decay.text": "If the query and the key are equal, RoPE's dot product is a mean of cosines, one for each pair. It "
    "is 1 at distance 0 and tends to decrease with distance. A larger base gives a slower decrease. This long-term "
    "decay is a tendency of this special case, not a general law: the curves oscillate, and other q and k have other "
    "curves.",
    "decay.caption": "Left: q · k of equal vectors of length 1 with {d} channels against their distance, for several "
    "bases. Thick lines are means over intervals of distance. Right: the quantity that the paper (Su et al. 2021, "
    "§3.4.3) shows to decay, a bound on q · k for any q and k, relative to its value at distance 0.",
    # 10
    "biases.title": "10. Encodings that add a bias to the logits",
    "biases.text": "Other encodings do not change embeddings, queries or keys. They add a number to the logit of each "
    "pair of query and key.",
    "biases.caption": "Head 1 of each encoding over {span} positions. ALiBi: linear in the distance. T5: one learned "
    "number for each bucket of distances; buckets get wider with distance. FIRE: a learned function of the distance "
    "relative to the position. FoX: the logarithms of gates, summed from the key to the query. The gates depend on "
    "the tokens (this sentence, repeated), so the same distance is penalized more at some positions than at others. "
    "T5, FIRE and FoX are shown before training. Each panel has its own colour scale.",
    # 11
    "trained.title": "11. In a trained model",
    "trained.text": "{model} has learned its weights with the encoding {encoding}. Here it reads the sentence three "
    "times: as it was trained, without the encoding in any layer, and with all positions moved by {moved:,} tokens. Of "
    "all its heads, head {head} of {heads} in layer {layer} of {layers} gives most weight to the previous token: "
    "{previous} on average. Its weights in the three readings:",
    "trained.caption": "Attention weights of this head. A row is a query, and a column is a key.",
    "trained.moved": "Without the encoding, the previous token gets {lost} on average. When all positions move by "
    "{moved:,} tokens, no weight of the head changes by more than {change}.",
    "trained.beyond": "Without the encoding, the previous token gets {lost} on average. The model cannot read the "
    "sentence {moved:,} tokens further: its table of positions ends before.",
    "trained.next": "The tokens that most likely come next, with their probabilities in the three readings:",
    # labels in pictures
    "label.trained": "as trained",
    "label.without": "without encoding",
    "label.moved": "moved by {moved:,}",
    "label.column": "column",
    "label.distance": "distance (tokens)",
    "label.dot": "dot product of two rows",
    "label.from": "from position {position:,}",
    "label.wave": "sines, one row per pair",
    "label.pair": "pair i",
    "label.wavelength": "wavelength (tokens)",
    "label.embeddings": "token embeddings",
    "label.positional": "positional embedding",
    "label.sum": "sum",
    "label.plane": "pair {pair}: θ = {theta} per token",
    "label.at": "{name} at {position}",
    "label.between": "angle between: {angle} rad",
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
    "box.noturn": "q and k are not changed",
    "box.turn": "rotate q of token m by m θᵢ, k of token n by n θᵢ",
    "box.leftresult": "q · k depends on m and on n",
    "box.rightresult": "q · k depends only on m - n",
}
