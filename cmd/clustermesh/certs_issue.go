package main

import (
	"fmt"
	"os"
	"path/filepath"

	"causeway/agent/api"
	"causeway/identity/pki"

	"github.com/spf13/cobra"
)

func newCertsIssueCommand(e *env) *cobra.Command {
	dir := "."
	cmd := &cobra.Command{
		Use:   "issue",
		Short: "Make a certificate for a client of xDS",
		Long: `Make a key, and have this cluster's authority sign a certificate for it that lets a client read services at L7 over xDS (docs/xds.md), and opens nothing
else. It writes client.key, client.crt and ca.crt; the key does not leave this machine. Repeat it before the certificate ends.`,
		Example: "  clustermesh certs issue --out /etc/shop/xds",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			request, key, err := pki.NewRequest()
			if err != nil {
				return err
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			signed, err := c.XDSCertificate(cmd.Context(), api.XDSCertificateRequest{Request: string(request)})
			if err != nil {
				return err
			}
			cert, err := pki.ParseCert([]byte(signed.Cert))
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			if err := pki.WriteFiles(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"), pki.Pair{Cert: []byte(signed.Cert), Key: key}); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, "ca.crt"), []byte(signed.CA), 0o644); err != nil {
				return fmt.Errorf("writing the authority's certificate: %w", err)
			}
			e.printer().printf("client.crt, client.key and ca.crt are in %s, valid until %s\n", dir, minute(cert.NotAfter))
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "out", dir, "the `DIRECTORY` to write the files to")
	return cmd
}
