#!/usr/bin/env bash
#
#   ./spark-submit.sh [--on WHERE] [--dry-run] [Spark options] JOB.py [job's arguments]
#
# Runs a job of the suite.
#
#   --on local              in one process on this machine, the default (also: local[CORES])
#   --on yarn-client        on YARN, its driver here
#   --on yarn-cluster       on YARN, its driver there too
#   --on spark://HOST:PORT  on a standalone Spark cluster, its driver here
#   --dry-run               print the command, run nothing
#
# Spark options are those of Spark's own spark-submit (--conf, --driver-memory, ...); they win over conf/spark-*.conf.
# YARN is the one that HADOOP_CONF_DIR says, else the one of `scripts/services up hdfs yarn`. A cluster's nodes need a
# Python of the version here, found as PYSPARK_PYTHON says (python3.11, for example), and nothing of ours: code, Python
# packages and jars go along, and a file of the settings that jobs take. No other setting leaves this machine.
#
# Exit codes: the job's; on yarn-cluster 1 if it failed, whatever its own; 2 wrong usage or setting; 6 not set up.
set -euo pipefail

readonly PROJECT=$(dirname "$(readlink -f "$0")")
readonly PYTHON=$PROJECT/.venv/bin/python
readonly USAGE_ERROR=2 NOT_SET_UP=6

fail() {
    local code=$1
    shift
    echo "spark-submit.sh: $*" >&2
    exit "$code"
}

# ---- The command line: ours and Spark's options up to the job, the rest is the job's.

on=local dry_run='' given=()
while (($#)); do
    case $1 in
        --on) on=${2-} && shift ;;
        --dry-run) dry_run=yes ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^#$//;s/^# //;p}' "$0" && exit ;;
        --verbose | -v | --supervise) given+=("$1") ;;
        --*=*) given+=("$1") ;;
        -*) given+=("$1" "${2-}") && shift ;;
        *) break ;;
    esac
    shift || fail $USAGE_ERROR "the last option lacks its value; see --help"
done
(($#)) || fail $USAGE_ERROR "which job? See --help"
job=$1
shift
[[ $job == *.py ]] || fail $USAGE_ERROR "$job is not a JOB.py; see --help"
[[ -e $job ]] || job=$PROJECT/$job
[[ -e $job ]] || fail $USAGE_ERROR "there is no job $job"
job=$(readlink -f "$job")

[[ -x $PYTHON && -e $PROJECT/.tickhouse/jars/.stamp ]] || fail $NOT_SET_UP "run scripts/setup first"
java_home=$("$PROJECT/scripts/java-home") || fail $NOT_SET_UP "there is no Java 17 or newer: run scripts/setup"

# ---- What the job's settings say.

ask() { PYTHONPATH=$PROJECT "$PYTHON" -m "$@"; }

facts=$(ask submit.facts "$@") || exit
{ read -r state && read -r filesystem && read -r webhdfs && read -r -a withheld && read -r network; } <<<"$facts"
# Spark gives its environment to processes of its own.
((${#withheld[@]} == 0)) || unset "${withheld[@]}"

# ---- Spark's options. Later ones win: ours first, then those of the command line.

options_of() { # the `key value` lines of a file in conf/
    local key value
    while read -r key value; do
        [[ -z $key || $key == \#* ]] || options+=(--conf "$key=$value")
    done <"$PROJECT/conf/$1"
}

jars_here=$PROJECT/.tickhouse/jars/spark
spark_home=$(echo "$PROJECT"/.venv/lib/python3*/site-packages/pyspark)
# The job keeps this process's number.
temporary=$state/tmp/job-$$
environment=("JAVA_HOME=$java_home" "SPARK_HOME=$spark_home")
environment+=("SPARK_CONF_DIR=$PROJECT/conf")
options=()
if [[ $network == loopback ]]; then
    # Spark binds its ports and its web page to this address: nobody else can connect to the job either.
    environment+=(SPARK_LOCAL_IP=127.0.0.1)
    # There is one DataNode. It is the client who chooses the number of replicas, and it would ask for three.
    options+=(--conf spark.hadoop.dfs.replication=1)
fi

ship() { # code and packages to nodes that have nothing of ours
    local folder
    folder=$(basename "$(dirname "$job")")
    [[ $folder == streaming ]] || folder=batch
    packages=$(ask submit.packages "$folder" ${dry_run:+--name-only})
    code=$(ask submit.code ${dry_run:+--name-only})
    node_python=${PYSPARK_PYTHON:-$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')}
    options+=(--py-files "$code" --conf spark.executorEnv.PYTHONPATH=packages)
    [[ $network != loopback ]] || options+=(--conf spark.executorEnv.SPARK_LOCAL_IP=127.0.0.1)
}

ship_to_yarn() {
    local jars
    ship
    environment+=("HADOOP_CONF_DIR=${HADOOP_CONF_DIR:-$state/services/yarn/conf}")
    if [[ -z ${HADOOP_CONF_DIR-} && -z $dry_run ]]; then
        [[ -e $state/services/yarn/conf/yarn-site.xml ]] || fail $NOT_SET_UP "no YARN yet: scripts/services up hdfs yarn"
        echo "spark-submit.sh: its containers' logs will be in $state/services/yarn/log/containers/" >&2
    fi
    jars=$(ask submit.spark_jars "$webhdfs" ${dry_run:+--name-only})
    options_of spark-yarn.conf
    options+=(--conf "spark.yarn.jars=$filesystem$jars/*.jar" --conf "spark.yarn.dist.archives=$packages#packages")
    [[ $network != loopback ]] || options+=(--conf spark.yarn.appMasterEnv.SPARK_LOCAL_IP=127.0.0.1)
}

# All jars by the class path, and their classes as an archive that Java maps into memory: as services/java.py has it.
driver_here() {
    options+=(--driver-class-path "$spark_home/jars/*:$jars_here/*")
    local archive=$PROJECT/.tickhouse/spark-classes.jsa java
    java="-XX:SharedArchiveFile=$archive -Xlog:disable -Xlog:all=warning:stderr"
    # Temporary files go where no other account can put a file of the same name, not to /tmp.
    options+=(--driver-java-options "$java -Djava.io.tmpdir=$temporary -XX:-UsePerfData")
    environment+=("TMPDIR=$temporary" "SPARK_LOCAL_DIRS=$temporary")
}

case $on in
    local | local\[*\])
        [[ $on == local ]] && on='local[*]'
        options=(--master "$on" "${options[@]}" --conf "spark.hadoop.hadoop.tmp.dir=$temporary/hadoop")
        driver_here
        node_python=$PYTHON
        ;;
    yarn-client)
        options=(--master yarn --deploy-mode client "${options[@]}")
        ship_to_yarn
        driver_here
        ;;
    yarn-cluster)
        options=(--master yarn --deploy-mode cluster "${options[@]}")
        ship_to_yarn
        job_settings=$(ask submit.settings ${dry_run:+--name-only} "$@")
        options+=(--conf "spark.yarn.dist.files=$job_settings#settings.toml")
        options+=(--conf spark.yarn.appMasterEnv.TICKHOUSE_CONF=settings.toml)
        options+=(--conf spark.yarn.appMasterEnv.PYTHONPATH=packages)
        options+=(--conf "spark.yarn.appMasterEnv.PYSPARK_PYTHON=$node_python")
        ;;
    spark://*)
        options=(--master "$on" "${options[@]}")
        ship
        driver_here
        options+=(--jars "$(printf '%s\n' "$jars_here"/*.jar | paste -sd,)")
        options+=(--conf "spark.archives=$packages#packages")
        ;;
    *) fail $USAGE_ERROR "--on $on: write local, yarn-client, yarn-cluster or spark://HOST:PORT" ;;
esac
options+=("${given[@]}")

# ---- The command. Where the driver is here, Python runs it and starts Spark's JVM with PYSPARK_SUBMIT_ARGS, as
# spark-submit would the other way round: so that a signal and the exit code are the job's, and a kill ends both.

# WORD... as they are to be read by a shell or by PYSPARK_SUBMIT_ARGS, an option with its value after each SEPARATOR.
# PLAIN: the characters besides letters, digits and dashes that need no quotes there.
quoted() {
    local separator=$1 plain="^[$2A-Za-z0-9-]+$" before='' word
    shift 2
    for word; do
        [[ $before == --* && $word != --* ]] && printf ' ' || printf '%s' "$separator"
        before=$word
        [[ $word =~ $plain ]] || word="'${word//\'/"'\\''"}'"
        printf '%s' "$word"
    done
}

if [[ $on == yarn-cluster ]]; then
    arguments=()
    while (($#)); do # the settings file has another name there
        case $1 in
            --conf) shift ;;
            --conf=*) ;;
            *) arguments+=("$1") ;;
        esac
        shift || true
    done
    command=("$PROJECT/.venv/bin/spark-submit" "${options[@]}" "$job" "${arguments[@]}")
else
    environment+=("PYTHONPATH=$PROJECT" "PYSPARK_PYTHON=$node_python")
    environment+=("PYSPARK_SUBMIT_ARGS=$(quoted $'\n    ' '][*_@%+=:,./#' "${options[@]}" pyspark-shell)")
    command=("$PYTHON" "$job" "$@")
fi

if [[ -n $dry_run ]]; then
    echo "env -u PYTHONPATH$(quoted $' \\\n  ' '_@%+=:,./#' "${environment[@]}" "${command[@]}")"
else
    for left in "$state"/tmp/job-*; do # by a job that has ended
        [[ ! -d $left ]] || kill -0 "${left##*-}" 2>/dev/null || rm -rf "$left"
    done
    (umask 077 && mkdir -p "$temporary")
    exec env -u PYTHONPATH "${environment[@]}" "${command[@]}"
fi
