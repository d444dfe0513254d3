"""What spark-submit runs; the packages come with ``--py-files dist/sparknorm.zip``."""

from pipeline.__main__ import main

main()
