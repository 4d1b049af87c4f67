#!/bin/sh
# init of the outer guest: a Debian host with a real KVM. Runs /job/run, then hands /out back.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/hugepages /out
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t hugetlbfs hugetlbfs /dev/hugepages
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
dmesg -n 1
for module in MODULES; do
    insmod /modules/$module.ko
done
export PATH=/usr/bin:/bin HOME=/root TMPDIR=/tmp
export STILLFRAME_LAB=/lab STILLFRAME_LAB_ACCEL=kvm
stty raw -echo < /dev/ttyS1
cd /root
printf '>>>outer up\n' > /dev/ttyS1
/bin/sh /job/run < /dev/null > /dev/ttyS1 2>&1
status=$?
tar -cf /dev/vda -C /out .
printf '\n>>>outer %s\n' "$status" > /dev/ttyS1
sync
poweroff -f
