package main

import (
	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	auditproxy "k8s.io/kubernetes/test/images/agnhost/audit-proxy"
	"k8s.io/kubernetes/test/images/agnhost/connect"
	"k8s.io/kubernetes/test/images/agnhost/dns"
	entrypoint "k8s.io/kubernetes/test/images/agnhost/entrypoint-tester"
	grpchealth "k8s.io/kubernetes/test/images/agnhost/grpc-health-checking"
	"k8s.io/kubernetes/test/images/agnhost/inclusterclient"
	"k8s.io/kubernetes/test/images/agnhost/liveness"
	logs "k8s.io/kubernetes/test/images/agnhost/logs-generator"
	"k8s.io/kubernetes/test/images/agnhost/mounttest"
	"k8s.io/kubernetes/test/images/agnhost/net"
	"k8s.io/kubernetes/test/images/agnhost/netexec"
	"k8s.io/kubernetes/test/images/agnhost/nettest"
	"k8s.io/kubernetes/test/images/agnhost/openidmetadata"
	"k8s.io/kubernetes/test/images/agnhost/pause"
	portforward "k8s.io/kubernetes/test/images/agnhost/port-forward-tester"
	"k8s.io/kubernetes/test/images/agnhost/porter"
	servehostname "k8s.io/kubernetes/test/images/agnhost/serve-hostname"
	tcpreset "k8s.io/kubernetes/test/images/agnhost/tcp-reset"
	webserver "k8s.io/kubernetes/test/images/agnhost/test-webserver"
)

// agnhost is the program of the image that Kubernetes' own tests run in their pods, without what has nothing to do with a network or with a
// kubelet.
func agnhost() int {
	root := &cobra.Command{Use: "agnhost", Short: "Servers and clients for pods, as Kubernetes' tests use them"}
	root.AddCommand(
		auditproxy.CmdAuditProxy,
		connect.CmdConnect,
		dns.CmdDNSSuffix, dns.CmdDNSServerList, dns.CmdEtcHosts,
		entrypoint.CmdEntrypointTester,
		grpchealth.CmdGrpcHealthChecking,
		inclusterclient.CmdInClusterClient,
		liveness.CmdLiveness,
		logs.CmdLogsGenerator,
		mounttest.CmdMounttest,
		net.CmdNet,
		netexec.CmdNetexec,
		nettest.CmdNettest,
		openidmetadata.CmdTestServiceAccountIssuerDiscovery,
		pause.CmdPause,
		porter.CmdPorter,
		portforward.CmdPortForwardTester,
		servehostname.CmdServeHostname,
		tcpreset.CmdTCPReset,
		webserver.CmdTestWebserver,
	)
	return cli.Run(root)
}
