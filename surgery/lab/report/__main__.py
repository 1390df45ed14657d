"""python -m surgery.lab.report RUN_DIR [RUN_DIR ...] [--out compare.html]"""

from surgery.lab.report.compare import main

if __name__ == "__main__":
    main()
