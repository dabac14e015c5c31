"""A transformers model whose blocks come and go, and the shapes of its experts.

streamed       the model: `load_block`, `free`, `read_expert`
classes, auto  which configuration, class and tokenizer belong to a checkpoint
matching       names on disk against the model's parameters
one_expert     lets transformers' converters run on a single expert
plain_loading  transformers' loader without threads and bars
downloads      which downloaded files a run still needs
families/      the shapes of experts modules
projects/      model classes of training projects
importers/     their checkpoints -> directories that transformers loads
precision      tensors that a model keeps in float32
finite         are all values numbers?
code           `--with-code`: loading without an import of qmoe
ties           tied parameters as a checkpoint stores them
"""
