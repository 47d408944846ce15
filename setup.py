"Package facts come from settings.ini, the one place they are written down."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
facts = config['DEFAULT']
here = Path(__file__).parent

setup(
    name=facts['lib_name'], version=facts['version'], description=facts['description'], keywords=facts['keywords'],
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter'],
    author=facts['author'], author_email=facts['author_email'], license='Apache-2.0',
    long_description=(here / 'README.md').read_text(encoding='utf-8') if (here / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['telemetry_loop', 'telemetry_loop.*']), include_package_data=True,
    python_requires='>=' + facts['min_python'],
    install_requires=facts['requirements'].split(),
    extras_require={extra: facts[f'{extra}_requirements'].split() for extra in ('dev', 'spark', 'bench')},
    entry_points={'console_scripts': facts['console_scripts'].split()},
)
