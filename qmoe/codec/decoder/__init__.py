"""Words -> integers, dense weights, or a product that never writes the weights down.

matrix        a blob and its parsed form
starts        where streams start
decode        integers, dense weights, products of one matrix
matvec        products of several matrices, an activation each, in one compiled call
matmul        products with several activations, in vector code
tiles         dense weights in vector code
addresses     a matrix as compiled code sees it
loops         compiled loops of `decode`
matvec_loops  compiled loops of products
vector_loops  the same over 64 streams at once, with lanes
lanes         a block of 64 streams, a lane each
registers     vectors of 16 floats for compiled loops
reference     the definition of the format in plain Python
integers      products with 8-bit integers that stay as they are in memory
room          memory for weights of one product
threads       compiled loops on several threads, also after a fork
"""
