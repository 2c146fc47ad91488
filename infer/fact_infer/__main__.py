import sys

from fact_infer.cli.main import main

sys.exit(main())
