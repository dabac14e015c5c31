"""Words -> integers, dense weights, or a product that never writes the weights down.

matrix        a blob and its parsed form
starts        where streams start
decode        integers, dense weights, products of one matrix
matvec        products of several matrices in one compiled call
loops         compiled loops of `decode`
matvec_loops  compiled loops of products
vector_loops  the same over 32 streams at once, with lanes
lanes         vectors of 16 lanes for compiled loops
reference     the definition of the format in plain Python
integers      products with 8-bit integers that stay as they are in memory
threads       compiled loops on several threads, also after a fork
"""
