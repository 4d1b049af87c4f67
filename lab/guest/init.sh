#!/bin/sh
# init of the lab's guests: mounts, plants the canary, then runs what arrives on the serial port.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp
mount -t tmpfs tmp /tmp
dmesg -n 1
# Planted pages carry their frame number: the kernel is asked not to move them.
echo never > /sys/kernel/mm/transparent_hugepage/enabled
echo 0 > /proc/sys/vm/compaction_proactiveness
# Locked pages are left where they are.
echo 0 > /proc/sys/vm/compact_unevictable_allowed
/bin/CANARY park &
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
stty raw -echo
echo 'stillframe-guest-ready'
# "a TEXT" adds base64 of a script, "x ID" runs it between two marked lines.
script=
while read -r word rest; do
    case "$word" in
    a) script="$script$rest" ;;
    x)
        printf '\n<<<%s\n' "$rest"
        printf %s "$script" | base64 -d > /tmp/.script
        script=
        sh /tmp/.script < /dev/null 2>&1
        printf '\n>>>%s %s\n' "$rest" "$?"
        ;;
    esac
done
