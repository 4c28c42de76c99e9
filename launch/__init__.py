"""How an experiment file reaches machines. An experiment ends with `if __name__ == '__main__': launch.main()`."""

from launch.cli import main as main
